"""The polar factor by products of matrices against the SVD's, and where it has to be refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kit import noise
from weightsmith.ops.polar import polar_by_products
from weightsmith.ops.spectral import polar


def with_values(*values: float, rows: int = 12) -> Tensor:
    """A matrix with these singular values."""
    count = len(values)
    left, right = (torch.linalg.qr(noise(n, count, seed=n, dtype=torch.float64)).Q for n in (rows, count))
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def error(matrix: Tensor) -> float:
    found = polar_by_products(matrix)
    assert found is not None
    return float((found - polar(matrix, "svd")).norm() / found.norm())


@pytest.mark.parametrize("shape", [(20, 20), (300, 40), (40, 300), (1, 7), (7, 1), (64, 63)])
def test_it_agrees_with_the_svd(shape: tuple[int, int]) -> None:
    assert error(noise(*shape, dtype=torch.float64)) < 1e-11
    assert error(noise(*shape, dtype=torch.float64) * 1e-20) < 1e-11
    found = polar_by_products(noise(*shape, dtype=torch.float64).float())
    assert found is not None
    assert found.dtype == torch.float64
    small = found.T @ found if shape[0] >= shape[1] else found @ found.T
    assert torch.allclose(small, torch.eye(min(shape), dtype=torch.float64), atol=1e-11)


@pytest.mark.parametrize("weakest", [0.5, 1e-2, 1e-4, 1.2e-5])
def test_weak_directions_arrive(weakest: float) -> None:
    assert error(with_values(1, 1, 0.7, 0.1, weakest)) < 1e-9


@pytest.mark.parametrize("weakest", [9e-7, 2e-6, 1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("strong", [(1,), (1, 1, 1, 1), (1, 1e-3)])
def test_what_it_cannot_tell_it_leaves_to_a_decomposition(weakest: float, strong: tuple[float, ...]) -> None:
    """Neither made as strong as the rest where the SVD drops it, nor dropped where the SVD keeps it."""
    matrix = with_values(*strong, weakest)
    if polar_by_products(matrix) is None:
        return
    assert weakest < 5e-7, "too near to what counts"
    assert error(matrix) < 2e-6


def test_repeated_columns_share_their_direction() -> None:
    x = noise(30, 5, dtype=torch.float64)
    twice = torch.cat([x, x], 1)
    assert error(twice) < 1e-11
    assert polar_by_products(torch.zeros(4, 3)) is None
    assert polar_by_products(torch.zeros(4, 0)) is None


def test_it_is_taken_on_accelerators_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr("weightsmith.ops.spectral.polar_by_products", asked.append)
    matrix = noise(9, 6, dtype=torch.float64)
    plain = polar(matrix)
    assert not asked
    monkeypatch.setattr("weightsmith.ops.spectral.on_accelerator", lambda _: True)
    assert torch.equal(polar(matrix), plain), "refused: the decomposition does it"
    assert len(asked) == 1
    polar(matrix, "svd")
    assert len(asked) == 1
