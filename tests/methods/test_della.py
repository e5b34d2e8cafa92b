"""DELLA: closed forms and distributions."""

from __future__ import annotations

import math

import pytest
import torch
from driver import every, merge, whole
from torch import Tensor

from kit import noise, refusal
from weightsmith.methods.della import Della, _rising


def della(change: Tensor, seed: int = 0, step: int = 7, **parameters) -> Tensor:
    stages = [Della(**parameters), "task_arithmetic"]
    cut = every(step) if step else whole
    return merge({"a": {"w": change}}, stages, base={"w": torch.zeros_like(change)}, seed=seed, cut=cut)["w"]


def test_large_changes_are_kept_more_often():
    """Every row holds the sizes 1 .. 8 in some order: the size tells the rank, and the rank the probability."""
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(4000)])
    change = (order + 1.0) * (1 - 2 * (order % 2))
    kept = della(change, rescale=False, density=0.4, epsilon=0.3) != 0
    for rank in range(8):
        p = 0.4 - 0.3 + 0.6 * rank / 7
        share = float(kept[order == rank].float().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 4000), rank


def test_a_vector_is_one_row_wherever_it_is_cut():
    change = torch.arange(1.0, 40_001.0)
    got = della(change, density=0.5, epsilon=0.4, rescale=False, step=997)
    assert torch.equal(got, della(change, density=0.5, epsilon=0.4, rescale=False, step=0))
    quarters = (got != 0).float().reshape(4, -1).mean(1)
    assert torch.allclose(quarters, torch.tensor([0.2, 0.4, 0.6, 0.8]), atol=0.02)
    assert torch.equal(got != 0, della(change, density=0.5, epsilon=0.4, rescale=False, seed=0) != 0)
    assert not torch.equal(got != 0, della(change, density=0.5, epsilon=0.4, rescale=False, seed=1) != 0)


def test_convolutions_are_ranked_over_their_inputs():
    change = torch.ones(3000, 2, 3)
    change[:, 1] = 2.0  # input 1 is the larger one at every place
    kept = (della(change, density=0.5, epsilon=0.4, rescale=False) != 0).float()
    assert torch.allclose(kept.mean((0, 2)), torch.tensor([0.1, 0.9]), atol=0.02)


def test_rescaling_keeps_the_norm_or_the_expectation():
    change = noise(200, 50, seed=3)
    got = della(change, density=0.3, epsilon=0.1)
    assert float(got.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=1e-5)
    mean = torch.stack(
        [della(change, s, rescale_rule="expectation", density=0.5, epsilon=0.3) for s in range(64)]
    ).mean(0)
    assert float((mean - change).mean()) == pytest.approx(0, abs=0.01)
    assert float((mean * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.02)


def test_ranks_are_those_of_a_stable_sort():
    sizes = torch.cat([noise(60, 50, seed=3).abs(), torch.randint(4, (60, 50)).float(), torch.zeros(3, 50)])
    sizes[5, 7] = sizes[5, 9] = math.inf
    for given in (sizes, sizes.T):
        order = given.argsort(dim=-1, stable=True)
        assert torch.equal(_rising(given), order)
        assert torch.equal(_rising(given.double()), order)


def test_density_one_and_rows_of_one_entry():
    change = noise(30, 4, seed=3)
    assert torch.equal(della(change, density=1.0, epsilon=0.4), change)
    column = della(torch.ones(20_000, 1), density=0.3, epsilon=0.2, rescale=False)
    assert float(column.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(della(torch.tensor(2.0), density=0.9, rescale=False)) in (0.0, 2.0)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.15), (0.9, 0.1), (0.05, 0.15)])
def test_probabilities_outside_zero_and_one_are_refused(density, epsilon):
    problem = refusal(Della(density=density, epsilon=epsilon), 2)
    assert problem is not None
    assert f"density {density:g} with epsilon {epsilon:g}" in problem
    assert refusal(Della(density=(0.5, 1.0), epsilon=(0.15, 0.4)), 2) is None
    assert refusal(Della(density=(0.5, density), epsilon=epsilon), 2) is not None
