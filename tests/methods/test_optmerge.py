"""OptMerge: its loops without iterating over matrices."""

from __future__ import annotations

from functools import partial

import driver
import pytest
import torch
from loops import adam, sgd

import weightsmith
from kit import noise

delta = partial(driver.delta, "optmerge")


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def loss(merged: torch.Tensor, taus: torch.Tensor, centred: bool) -> torch.Tensor:
    """With the rank-k tau_i itself as projector: its left factor changes no norm."""
    rank, mean = min(taus.shape[1:]) // len(taus), taus.mean(0)
    total = torch.zeros((), dtype=taus.dtype)
    for tau in taus:
        target = mean + truncated(tau - mean, rank) if centred else truncated(tau, rank)
        total = total + ((merged - target) @ truncated(tau, rank).T).square().sum() / tau.square().sum()
    return total


SHAPES = pytest.mark.parametrize("shape", [(8, 11), (11, 8), (3, 20)], ids=["wide", "tall", "very wide"])


@SHAPES
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_momentum_needs_no_loop_over_matrices(shape, variant):
    taus = torch.stack([noise(*shape, seed=i) for i in range(3)])
    wide = taus.double()
    expected = sgd(lambda m: loss(m, wide, variant == "full"), wide.mean(0), 40, lr=0.01, momentum=0.8).float()
    assert (expected - taus.mean(0)).abs().max() > 0.01
    got = delta(*taus, variant=variant, optimizer="sgd", init="mean", iters=40, lr=0.01, momentum=0.8)
    assert torch.allclose(got, expected, atol=1e-6)


@SHAPES
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_the_loop_of_adam(shape, variant):
    taus = torch.stack([noise(*shape, seed=i) for i in range(3)])
    wide = taus.double()
    expected = adam(lambda m: loss(m, wide, variant == "full"), wide.sum(0), 40, lr=0.01).float()
    assert (expected - taus.sum(0)).abs().max() > 0.1
    got = delta(*taus, variant=variant, optimizer="adam", init="sum", iters=40, lr=0.01)
    assert torch.allclose(got, expected, atol=1e-5)


def test_auto_is_what_the_authors_use():
    taus = [noise(8, 9, seed=i) for i in range(2)]
    full, lora = {"optimizer": "adam", "lr": 1e-5, "init": "sum"}, {"optimizer": "sgd", "lr": 1e-4, "init": "mean"}
    assert torch.equal(delta(*taus), delta(*taus, variant="full", **full))
    assert torch.equal(delta(*taus, variant="lora"), delta(*taus, variant="lora", **lora))
    assert not torch.equal(delta(*taus, variant="lora", **full), delta(*taus, variant="lora", **lora))


def test_the_loss_falls_step_by_step():
    taus = torch.stack([noise(8, 9, seed=i) for i in range(3)])
    after = [delta(*taus, variant="lora", iters=n, lr=1e-3) for n in (0, 1, 2, 10, 100)]
    losses = [float(loss(m, taus, centred=False)) for m in after]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_fewer_rows_than_tasks_leave_the_start():
    taus = [noise(2, 9, seed=i) for i in range(3)]
    assert torch.equal(delta(*taus), sum(taus))
    assert torch.allclose(delta(*taus, variant="lora"), sum(taus) / 3, atol=1e-7)


def test_a_task_of_zeros_has_no_say():
    a, b, zero = noise(9, 9), noise(9, 9, seed=1), torch.zeros(9, 9)
    assert torch.isfinite(delta(a, zero, b)).all()
    moved = [delta(*taus, variant="lora", lr=0.01, init="sum") - (a + b) for taus in [(a, zero, b), (zero, b, a)]]
    assert torch.allclose(moved[0], moved[1], atol=1e-6)


def test_what_is_excluded_stays_the_bases_bit_for_bit():
    base = {"visual.proj.weight": noise(4, 4), "layers.0.mlp.up_proj.weight": noise(6, 4), "norm.weight": noise(4)}
    experts = {f"e{i}": {n: t + 0.1 * noise(*t.shape, seed=i) for n, t in base.items()} for i in range(2)}
    merged = weightsmith.merge(experts, "optmerge", base=base, exclude=["visual.*", "*norm*"])
    changed = [name for name in base if not torch.equal(merged[name], base[name])]
    assert changed == ["layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_the_rate_of_sgd_is_relative_and_that_of_adam_absolute(variant):
    taus = [noise(8, 9, seed=i) for i in range(3)]
    given = {"variant": variant, "init": "sum", "lr": 1e-3, "iters": 10}
    moved = {
        optimizer: [delta(*(c * t for t in taus), optimizer=optimizer, **given) - c * sum(taus) for c in (1.0, 0.1)]
        for optimizer in ("sgd", "adam")
    }
    assert torch.allclose(moved["sgd"][1], 0.1 * moved["sgd"][0], atol=1e-7)
    for by_adam in moved["adam"]:
        assert 8e-3 < float(by_adam.abs().max()) <= 10 * 1e-3 * 1.1


def test_the_sum_is_as_many_means_as_there_are_experts():
    taus = [noise(8, 9, seed=i) for i in range(3)]
    by_sum, by_mean = (delta(*taus, init=init, iters=0) for init in ("sum", "mean"))
    assert torch.allclose(by_sum, 3 * by_mean, atol=1e-6)
    assert torch.allclose(delta(*taus, init="sum", iters=0, scaling=1 / 3), by_mean, atol=1e-6)
