"""ZipIt!: what is merged with what, by hand, and layers that stay what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit import noise
from weightsmith.align.zipit import zipped, zipped_weight
from weightsmith.core.errors import RecipeError


def correlations(*features: np.ndarray) -> np.ndarray:
    return np.corrcoef(np.concatenate(features, 1), rowvar=False)


def test_a_permuted_copy_becomes_the_model_itself() -> None:
    weights = [noise(6, 5, seed=1), noise(6, seed=2), noise(3, 6, seed=3)]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    other = [weights[0][order], weights[1][order], weights[2][:, order]]
    x = noise(200, 5, seed=5)
    hidden = [torch.relu(x @ w[0].T + w[1]) for w in (weights, other)]
    found = zipped(correlations(*(h.numpy() for h in hidden)))
    assert found.width == 6
    one = [zipped_weight(weights[0], other[0], found), zipped_weight(weights[1], other[1], found)]
    last = zipped_weight(weights[2], other[2], None, found)
    got = torch.relu(x @ one[0].T + one[1]) @ last.T
    torch.testing.assert_close(got, hidden[0] @ weights[2].T)


def test_pairs_inside_a_model_are_merged_while_their_allowance_lasts() -> None:
    """Units 0, 1 of model 1 are nearly one, and so are 2, 3; across the models all are strangers."""
    alike = np.full((8, 8), 0.1)
    alike[0, 1] = alike[1, 0] = 0.9
    alike[2, 3] = alike[3, 2] = 0.8
    one = zipped(alike, 2 / 8, within=0.25).members  # one pair a model
    assert one[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert one[2].argmax() != one[3].argmax()
    two = zipped(alike, 2 / 8, within=0.5).members
    assert two[2].argmax() == two[3].argmax()
    none = zipped(alike, 2 / 8, within=0.0).members
    assert ((none[:4].sum(0) <= 1) & (none[4:].sum(0) <= 1)).all()


def test_a_merged_unit_is_merged_again_less_readily() -> None:
    """0 and 2 first; then 1 with 3 at 0.5, not with the merged unit, whose 0.9 counts 0.3 * 0.6."""
    alike = np.array([[1, 0.9, 1, 0.6], [0.9, 1, 0.6, 0.5], [1, 0.6, 1, 0], [0.6, 0.5, 0, 1]])
    found = zipped(alike, 0.5, within=1.0).members
    assert found.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert zipped(alike, 0.5, within=1.0, repeat=1.0).members.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]


def test_what_cannot_be_merged_is_said() -> None:
    alike = np.full((4, 4), 0.5)
    with pytest.raises(RecipeError, match=r"nothing is left to merge at 2 of 4 units: raise within \(0\)"):
        zipped(alike, 0.75, within=0.0, repeat=0.0)
    with pytest.raises(RecipeError, match=r"are \[2 n, 2 n\], not \[3, 3\]"):
        zipped(np.eye(3))
    assert zipped(np.full((4, 4), np.nan)).width == 2


def test_units_of_one_model_stay_free_where_mixed_ones_are_not() -> None:
    """0 and 1 of model 1 first, then both with 2; what holds units of both is merged no more."""
    alike = np.array([[1, 0.9, 0.5, 0.1], [0.9, 1, 0.4, 0.1], [0.5, 0.4, 1, 0.2], [0.1, 0.1, 0.2, 1]])
    assert zipped(alike, 0.25, within=0.5, repeat=0.0).members[:, 0].tolist() == [1, 1, 0, 0]
    assert zipped(alike, 0.5, within=0.5, repeat=0.0).members.tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    with pytest.raises(RecipeError, match="nothing is left to merge at 2 of 4 units"):
        zipped(alike, 0.75, within=0.5, repeat=0.0)
