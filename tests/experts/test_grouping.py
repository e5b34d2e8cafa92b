"""Experts that become one: closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit import noise
from weightsmith.core.errors import WeightsmithError
from weightsmith.experts.grouping import affinity, budget, group, merged, unit_order


def test_affinity_is_a_cosine_between_0_and_1():
    found = affinity(torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, 0]]))
    wanted = [[1, 0.5, 0, 0.5], [0.5, 1, 0.5, 0.5], [0, 0.5, 1, 0.5], [0.5, 0.5, 0.5, 1]]
    assert found.tolist() == wanted


def test_layers_share_a_budget_by_use():
    usage = [np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.3, 0.3, 0.2, 0.2])]
    assert budget(usage, 2) == [1, 1]
    assert budget(usage, 5) == [1, 4]  # 0.3, 0.2 and 0.2 of the second come before 0.1
    assert budget(usage, 6) == [2, 4]
    assert budget(usage, 8) == [4, 4]
    for total in range(2, 9):
        assert sum(budget(usage, total)) == total
    with pytest.raises(WeightsmithError, match=r"1 groups in all; expected 2 \(one a layer\) to 8 \(no merging\)"):
        budget(usage, 1)


def test_the_most_used_found_groups_that_others_join():
    usage = np.array([0.1, 0.4, 0.2, 0.3])
    alike = np.full((4, 4), 0.5)
    alike[0, 3], alike[2, 1] = 0.9, 0.8
    assert group(usage, alike, 2).tolist() == [1, 0, 0, 1]
    assert group(usage, np.full((4, 4), 0.5), 2).tolist() == [0, 0, 0, 1]  # of equals the one that is used more
    assert group(usage, alike, 4).tolist() == [3, 0, 2, 1]
    with pytest.raises(WeightsmithError, match="5 groups of 4 experts; expected 1 to 4"):
        group(usage, alike, 5)


def test_usage_weighs_the_members():
    weights = [noise(4, 3, seed=i) for i in range(3)]
    assert torch.allclose(merged(weights, [0.0, 1.0, 0.0]), weights[1], atol=1e-6)
    assert torch.allclose(merged(weights, [0.2, 0.2, 0.2]), sum(weights) / 3, atol=1e-5)
    assert torch.allclose(merged(weights, [0.0, 0.0, 0.0]), sum(weights) / 3, atol=1e-6)
    exact = (0.5 * weights[0] + 0.25 * weights[2]) / (0.75 + 1e-7)
    assert torch.allclose(merged([weights[0], weights[2]], [0.5, 0.25]), exact, atol=1e-7)


@pytest.mark.parametrize("outward", [True, False])
def test_permuted_units_are_found_again_and_the_function_stays(outward: bool):
    gate, up, down = noise(7, 5, seed=1), noise(7, 5, seed=2), noise(5, 7, seed=3)
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    moving = (gate[shuffled], up[shuffled]), (down[:, shuffled],)
    order = unit_order(((gate, up), (down,)), moving, outward)
    aligned = (moving[0][0][order], moving[0][1][order], moving[1][0][:, order])
    assert all(torch.equal(a, b) for a, b in zip(aligned, (gate, up, down), strict=True))
    x = noise(6, 5, seed=9)
    before = (torch.nn.functional.silu(x @ moving[0][0].T) * (x @ moving[0][1].T)) @ moving[1][0].T
    after = (torch.nn.functional.silu(x @ aligned[0].T) * (x @ aligned[1].T)) @ aligned[2].T
    assert torch.allclose(before, after, atol=1e-6)
