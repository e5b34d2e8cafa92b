"""Breadcrumbs: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge, run, sites

from kit import noise
from weightsmith.core.method import Pipeline
from weightsmith.methods.breadcrumbs import Breadcrumbs
from weightsmith.methods.task_arithmetic import TaskArithmetic


def masked(change: torch.Tensor, step: int = 2, **parameters) -> torch.Tensor:
    pipeline = Pipeline((Breadcrumbs(**parameters), TaskArithmetic()))
    return run(pipeline, sites({"a": {"w": change}}, {"w": torch.zeros_like(change)}), every(step))["w"]


@pytest.mark.parametrize("shape", [(1, 5), (5,)])
def test_the_row_of_the_sheet(shape):
    row = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0]).reshape(shape)
    got = masked(row, scope_="row", density=0.4, remove_top=0.2)
    assert got.flatten().tolist() == [0, -4, 3, 0, 0]
    got = masked(row, scope_="row", density=0.4, remove_top=0.2, remove_first=False)
    assert got.flatten().tolist() == [0, -4, 0, 0, 0]


def test_counts_follow_the_formulas():
    change = noise(10, 32, seed=3)
    row = masked(change, scope_="row", density=0.15, remove_top=0.1)
    assert ((row != 0).sum(1) == int(32 * 0.15)).all()
    nothing_removed = masked(change, scope_="row", density=0.5, remove_top=0.006)  # int(32 * 0.006) = 0
    assert torch.equal(nothing_removed.abs().amax(1), change.abs().amax(1))
    for density, top in [(0.7, 0.05), (0.9, 0.01), (0.8, 0.3)]:  # the last removes less, so that density survives
        assert int((masked(change, density=density, remove_top=top) != 0).sum()) == int(320 * density)
    survivors = masked(change, density=0.6, remove_top=0.1).abs()
    order = change.abs().flatten().sort(descending=True).values
    assert torch.equal(survivors.flatten().sort(descending=True).values[:192], order[32:224])


def test_density_one_leaves_a_tensor_alone_and_a_row_without_its_top():
    change = noise(4, 10, seed=3)
    assert torch.equal(masked(change, density=1.0, remove_top=0.3), change)
    assert ((masked(change, scope_="row", density=1.0, remove_top=0.3) != 0).sum(1) == 7).all()
    assert torch.equal(masked(change, scope_="row", density=1.0, remove_top=0.0), change)


def test_scaling_and_reshaping():
    change = noise(6, 8, seed=3)
    for scope in ("row", "tensor"):
        assert torch.equal(masked(change * 4, scope_=scope), masked(change, scope_=scope) * 4)
    assert torch.equal(masked(change.T.contiguous(), density=0.5), masked(change, density=0.5).T)
    by_row = masked(change, scope_="row", density=0.5)
    assert not torch.equal(masked(change.T.contiguous(), scope_="row", density=0.5), by_row.T)


def test_equals_go_by_lower_index():
    assert masked(torch.ones(2, 4), density=0.5, remove_top=0.25).flatten().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_numbers_stay_and_rescaling_keeps_the_norm():
    assert float(masked(torch.tensor(3.0), density=0.1)) == 3.0
    change = noise(6, 8, seed=3)
    got = masked(change, density=0.4, remove_top=0.1, rescale=True)
    assert float(got.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=1e-6)


def test_each_expert_has_its_own_shares():
    experts = {"a": {"w": noise(5, 5, seed=3)}, "b": {"w": noise(5, 5, seed=3)}}
    base = {"w": torch.zeros(5, 5)}
    crumbs = Breadcrumbs(density=(0.2, 1.0), remove_top=(0.1, 0.5))
    got = merge(experts, [crumbs, "task_arithmetic"], base=base)["w"]
    assert int((got == noise(5, 5, seed=3)).sum()) == 20  # only b is left there
