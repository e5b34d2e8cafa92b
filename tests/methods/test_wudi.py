"""WUDI: closed forms, and the loop it stands for."""

from __future__ import annotations

from functools import partial

import driver
import pytest
import torch
from loops import adam

from kit import noise

delta = partial(driver.delta, "wudi")


def loss(merged: torch.Tensor, taus: torch.Tensor) -> torch.Tensor:
    return sum(((merged - t) @ t.T).square().sum() / t.square().sum() for t in taus)


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
