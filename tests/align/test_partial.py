"""Partial merging: widths, blocks, and that equal models stay equal at every width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit import noise
from weightsmith.align.partial import expanded, flops, ratio_for, split
from weightsmith.core.errors import RecipeError

N = 9
ORDER = np.random.default_rng(0).permutation(N)
PROFIT = np.random.default_rng(1).standard_normal((N, N))


def two_layers(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return noise(N, 5, seed=seed), noise(N, seed=seed + 1), noise(4, N, seed=seed + 2)


def run(fc1: torch.Tensor, bias: torch.Tensor, fc2: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ fc1.T + bias) @ fc2.T


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_equal_models_stay_what_they_are_at_every_width(ratio: float) -> None:
    fc1, bias, fc2 = two_layers(0)
    index = torch.from_numpy(np.argsort(ORDER))
    other = fc1[index], bias[index], fc2[:, index]
    found = split(PROFIT, ORDER, ratio)
    wide = expanded(fc1, other[0], found), expanded(bias, other[1], found), expanded(fc2, other[2], None, found)
    assert wide[0].shape == (found.width, 5)
    x = noise(3, 5, seed=9)
    assert torch.allclose(run(*wide, x), run(fc1, bias, fc2, x), atol=1e-5)


def test_at_ratio_one_both_networks_are_there() -> None:
    a, b = two_layers(0), two_layers(50)
    found = split(PROFIT, ORDER, 1.0)
    assert found.merged.shape == (2, 0)
    x = noise(3, 5, seed=9)
    hidden = torch.relu(x @ expanded(a[0], b[0], found).T + expanded(a[1], b[1], found))
    for model, own in enumerate((a, b)):
        assert torch.equal(hidden[:, torch.from_numpy(found.slots(model))], torch.relu(x @ own[0].T + own[1]))


def test_at_ratio_zero_it_is_the_average_in_the_order_of_the_first() -> None:
    a, b = noise(N, N), noise(N, N, seed=1)
    found = split(PROFIT, ORDER, 0.0)
    index = torch.from_numpy(ORDER)
    assert torch.equal(expanded(a, b, found, found), (a + b[index][:, index]) / 2)


def test_separate_units_of_two_models_do_not_see_each_other() -> None:
    found = split(PROFIT, ORDER, 0.5)
    k, m = found.merged.shape[1], found.separate.shape[1]
    wide = expanded(noise(N, N), noise(N, N, seed=1), found, found)
    assert not wide[k : k + m, k + m :].any()
    assert not wide[k + m :, k : k + m].any()
    assert int((wide == 0).sum()) == 2 * m * m


def test_the_best_pairs_are_merged_and_of_equal_ones_the_first() -> None:
    profit = np.diag([3.0, 1.0, 2.0, 1.0, 1.0])
    found = split(profit, np.arange(5), 0.5)
    assert found.merged[0].tolist() == [0, 1, 2]
    assert found.separate[0].tolist() == [3, 4]
    with pytest.raises(RecipeError, match=r"between 0 and 1, not 1\.5"):
        split(profit, np.arange(5), 1.5)


def test_operations_are_those_of_the_blocks() -> None:
    found = split(PROFIT, ORDER, 0.5)
    m = found.separate.shape[1]
    counted = (found.width**2 - 2 * m * m) / N**2
    assert flops([(N * N, m / N, m / N)]) == pytest.approx(counted)
    assert flops([(7.0, None, 0.5), (3.0, 0.5, None)]) == 1.5
    assert flops([]) == 1.0


def test_a_budget_gives_a_ratio() -> None:
    def cost(ratio: float) -> float:
        return flops([(1.0, None, ratio), (1.0, ratio, ratio), (1.0, ratio, None)])

    for budget in (1.0, 1.2, 1.55, 1.8):
        assert cost(ratio_for(budget, cost)) == pytest.approx(budget, abs=1e-5)
    assert ratio_for(2.0, cost) == 1.0
    with pytest.raises(RecipeError, match="less than one model"):
        ratio_for(0.9, cost)
