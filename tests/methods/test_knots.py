"""KnOTS: closed forms."""

from __future__ import annotations

from functools import partial

import driver
import pytest
import torch
from driver import merge, sites
from torch import Tensor

from kit import noise
from weightsmith.methods.knots import Knots

delta = partial(driver.delta, "knots")


def low(seed: int, rows: int = 10, columns: int = 12, rank: int = 2) -> Tensor:
    return noise(rows, rank, seed=seed) @ noise(rank, columns, seed=seed + 50)


CHANGES = [low(i) for i in range(3)]
BOTH = pytest.mark.parametrize("shared", ["left", "right"])


@BOTH
def test_coordinates_hold_the_task_vectors(shared):
    site = sites({f"e{i}": {"w": c} for i, c in enumerate(CHANGES)}, {"w": torch.zeros(10, 12)})["w"]
    basis, z = Knots(shared=shared).coordinates(site)
    assert basis.shape[1] == 6, "the sum of the ranks"
    for change, own in zip(CHANGES, z, strict=True):
        product = basis.float() @ own
        assert torch.allclose(product if shared == "left" else product.T, change, atol=1e-5)


@BOTH
def test_the_mean_of_all_coordinates_is_the_mean(shared):
    assert torch.allclose(delta(*CHANGES, rule="mean", shared=shared, scaling=0.5), 0.5 * sum(CHANGES) / 3, atol=1e-5)
    summed = delta(*CHANGES, rule="mean", aggregate="sum", shared=shared, scaling=(1.0, 2.0, 0.0))
    assert torch.allclose(summed, CHANGES[0] + 2 * CHANGES[1], atol=1e-5)


def test_it_commutes_with_turning_the_outputs_which_ties_does_not():
    turn = torch.linalg.qr(noise(10, 10, seed=9)).Q
    for parameters in ({}, {"density": 0.3}, {"aggregate": "max"}, {"rule": "mean", "aggregate": "max"}):
        plain = delta(*CHANGES, **parameters)
        turned = delta(*(turn @ c for c in CHANGES), **parameters)
        assert torch.allclose(turned, turn @ plain, atol=1e-4), parameters
    ties = driver.delta("ties", *CHANGES, density=1.0)
    assert not torch.allclose(driver.delta("ties", *(turn @ c for c in CHANGES), density=1.0), turn @ ties, atol=1e-2)


def test_the_rank_is_at_most_the_sum_of_ranks():
    found = torch.linalg.svdvals(delta(*CHANGES, density=0.5))
    assert float(found[5]) > 1e-3
    assert float(found[6]) < 1e-5 * float(found[0])


def test_the_largest_coordinates_are_counted_over_all_matrices():
    """A matrix whose changes are all smaller than those of another keeps nothing."""
    small, large = low(1), 1e3 * low(2)
    models = {"e0": {"a": small, "b": large}}
    base = {n: torch.zeros(10, 12) for n in "ab"}
    got = merge(models, "knots", base=base, density=0.4)
    assert torch.equal(got["a"], base["a"])
    assert float(got["b"].norm()) > 0.9 * float(large.norm())
    alone = merge({"e0": {"a": small}}, "knots", base={"a": base["a"]}, density=0.4)
    assert float(alone["a"].norm()) > 0.5 * float(small.norm())


def test_opposite_tasks_keep_nothing():
    assert torch.allclose(delta(CHANGES[0], -CHANGES[0]), torch.zeros(10, 12), atol=1e-5)


def test_dropping_is_unbiased_and_keyed_by_the_expert():
    a = delta(*CHANGES, rule="mean", drop=0.5)
    assert torch.equal(a, delta(*CHANGES, rule="mean", drop=0.5))
    assert not torch.allclose(a, delta(*CHANGES, rule="mean"), atol=1e-2)
    base = {"w": torch.zeros(10, 12)}
    runs = [merge({"e": {"w": CHANGES[0]}}, "knots", base=base, drop=0.5, seed=s)["w"] for s in range(400)]
    error = (torch.stack(runs).mean(0) - CHANGES[0]).norm() / CHANGES[0].norm()
    assert float(error) < 0.1


def test_other_tensors_stay_the_base():
    assert torch.equal(delta(noise(5), noise(5, seed=1)), torch.zeros(5))


@pytest.mark.parametrize("parameters", [{}, {"density": 0.4}, {"rule": "mean"}])
def test_tiny_adapters_and_layers_without_a_change(parameters):
    """The authors cut singular values at 1e-5: adapters below it vanish there."""
    plain, tiny = delta(*CHANGES, **parameters), delta(*(1e-8 * c for c in CHANGES), **parameters)
    assert float(tiny.norm()) > 0
    assert torch.allclose(tiny * 1e8, plain, atol=1e-4)
    base = {n: noise(10, 12, seed=9) for n in ("a", "b")}
    models = {f"e{i}": {"a": base["a"], "b": base["b"] + c} for i, c in enumerate(CHANGES)}
    assert torch.equal(merge(models, "knots", base=base, **parameters)["a"], base["a"])
