"""WUDI: closed forms, and the loop it stands for."""

from __future__ import annotations

import pytest
import torch
from driver import merge
from loops import adam


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def delta(*changes: torch.Tensor, **parameters) -> torch.Tensor:
    base = {"w": torch.zeros_like(changes[0])}
    return merge({f"e{i}": {"w": c} for i, c in enumerate(changes)}, "wudi", base=base, **parameters)["w"]


def loss(merged: torch.Tensor, taus: torch.Tensor) -> torch.Tensor:
    return sum(((merged - t) @ t.T).square().sum() / t.square().sum() for t in taus)


def test_one_expert_comes_back_exactly():
    change = noise(6, 9)
    assert torch.equal(delta(change, lr=0.1), change)


def test_orthogonal_rows_leave_the_sum_where_it_is():
    q = torch.linalg.qr(noise(12, 12)).Q
    changes = [noise(5, 4, seed=i) @ q[4 * i : 4 * i + 4] for i in range(3)]
    assert torch.allclose(delta(*changes, lr=1e-3), sum(changes), atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 30)], ids=["wide", "tall", "very wide"])
def test_the_loop_over_matrices(shape):
    changes = torch.stack([noise(*shape, seed=i) for i in range(3)])
    taus = changes.double()
    expected = adam(lambda m: loss(m, taus), taus.sum(0), steps=60, lr=0.02).float()
    assert (expected - changes.sum(0)).abs().max() > 0.2
    assert torch.allclose(delta(*changes, iters=60, lr=0.02), expected, atol=1e-5)


def test_no_entry_moves_further_than_the_steps_allow():
    changes = torch.stack([noise(6, 9, seed=i) for i in range(3)])
    moved = (delta(*changes) - changes.sum(0)).abs().max()
    assert 1e-3 < moved <= 300 * 1e-5 * 1.1
    assert torch.equal(delta(*changes, iters=0), changes.sum(0))


def test_the_loss_falls():
    changes = torch.stack([noise(6, 9, seed=i) for i in range(3)])
    losses = [float(loss(delta(*changes, iters=n, lr=1e-3), changes)) for n in (0, 50, 100, 200)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.9 * losses[0]


def test_a_task_of_zeros_has_no_say():
    a, b = noise(6, 9), noise(6, 9, seed=1)
    assert torch.equal(delta(a, torch.zeros(6, 9), b, lr=1e-3), delta(a, b, lr=1e-3))
    assert torch.equal(delta(torch.zeros(6, 9), torch.zeros(6, 9)), torch.zeros(6, 9))


def test_scaling_and_other_tensors():
    a, b = noise(6, 9), noise(6, 9, seed=1)
    assert torch.allclose(delta(a, b, scaling=0.3), 0.3 * delta(a, b), atol=1e-6)
    for shape in [(5,), (), (3, 2, 2)]:
        a, b = noise(*shape), noise(*shape, seed=1)
        assert torch.allclose(delta(a, b, scaling=0.3), 0.3 * (a + b) / 2, atol=1e-6)
