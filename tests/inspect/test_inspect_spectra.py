"""Spectra, ranks and singular task interference in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from inspected import of
from torch import Tensor

from weightsmith.core.keys import Key
from weightsmith.core.site import Site
from weightsmith.inspect.spectra import (
    Spectrum,
    chance,
    effective_rank,
    interference,
    small_enough,
    stable_rank,
)
from weightsmith.ops.spectral import Svd

torch.set_num_threads(1)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    draw = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw).Q


def test_ranks() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0])) == 1
    p = torch.tensor([0.75, 0.25])
    assert effective_rank(8 * p) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)
    assert effective_rank(torch.zeros(0)) == stable_rank(torch.zeros(0)) == 0


def singular_interference(*parts: Svd) -> float:
    return float(interference(parts).abs().sum())


def test_interference_of_orthogonal_equal_and_tilted_experts() -> None:
    q, r = orthonormal(12, 8, 0), orthonormal(9, 8, 1)
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    one = Svd(q[:, :4], s, r[:, :4])
    assert singular_interference(one, Svd(q[:, 4:], s, r[:, 4:])) == pytest.approx(0, abs=1e-12)
    assert singular_interference(one, Svd(q[:, 4:], s, r[:, :4])) == pytest.approx(0, abs=1e-12)  # one side suffices
    # Twice the same: U^T U - I swaps the experts, so what is left is diag(s) for each.
    assert singular_interference(one, one) == pytest.approx(2 * 10)
    # Rank one, at angles of cosine c and d: the entries are s c d.
    c, d = 0.6, 0.3
    first = Svd(q[:, :1], s[:1], r[:, :1])
    tilted = Svd(c * q[:, :1] + 0.8 * q[:, 1:2], s[1:2], d * r[:, :1] + math.sqrt(1 - d * d) * r[:, 1:2])
    assert singular_interference(first, tilted) == pytest.approx((4 + 3) * c * d)


@pytest.mark.parametrize("count", [2, 3])
def test_random_directions_interfere_as_by_chance(count: int) -> None:
    s = torch.linspace(5, 1, 40, dtype=torch.float64)
    parts = [Svd(orthonormal(240, 40, 10 * t), s, orthonormal(160, 40, 10 * t + 1)) for t in range(count)]
    assert float(interference(parts).square().sum()) == pytest.approx(chance(parts), rel=0.1)


def low_rank(seed: int, rank: int = 2) -> Tensor:
    return (orthonormal(16, rank, seed) @ (3 * orthonormal(12, rank, seed + 100).T)).float()


def test_spectra_of_an_inspection() -> None:
    """Rank 2 with equal singular values; three experts keep 12 // 3 = 4 directions of each, which is everything."""
    tail = torch.diag_embed(torch.arange(12, 0, -1).float())
    deltas = [{"l.0.w": low_rank(0), "b": torch.ones(5)}, {"l.0.w": low_rank(0), "b": torch.ones(5)}]
    base = {"l.0.w": torch.zeros(16, 12), "b": torch.zeros(5)}
    spectra = of(base, [*deltas, {"l.0.w": torch.zeros(16, 12), "b": torch.ones(5)}]).model.spectra
    assert spectra is not None
    assert spectra.matrices == (1, 1, 0)
    assert spectra.effective_rank == (pytest.approx(2), pytest.approx(2), None)
    assert spectra.effective_share == (pytest.approx(1 / 6), pytest.approx(1 / 6), None)
    assert spectra.stable_rank[:2] == pytest.approx((2, 2))
    assert spectra.kept[:2] == pytest.approx((1, 1))
    assert spectra.interference == pytest.approx(2 * 6)
    assert spectra.curve[0][:3] == pytest.approx((1, 1, 1))
    assert spectra.curve[0][5:] == (0,) * 28
    # Singular values 12 .. 1 of a diagonal matrix; two experts keep six.
    pair = of({"w": torch.zeros(12, 12)}, [{"w": tail}, {"w": 2 * tail}]).model.spectra
    assert pair is not None
    assert pair.kept == pytest.approx((sum(i * i for i in range(7, 13)) / sum(i * i for i in range(1, 13)),) * 2)
    assert pair.stable_rank[1] == pytest.approx(650 / 144)
    assert pair.interference == pytest.approx(3 * sum(range(7, 13)))
    assert pair.by_chance == pytest.approx(12 / 6)  # all of |s|^2 against 6 x 6 entries of |s|^2 / 12^2


def test_an_adapter_stays_a_product() -> None:
    left, right = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.randn(3, 10)
    key = Key("w", (20, 10), "float32")
    product = Site(key, torch.empty(1, 20, 10, device="meta"), torch.zeros(20, 10), factors=((left, right),))
    dense = Site(key, (left @ right)[None], torch.zeros(20, 10))
    a, b = (Spectrum().see(site)["s"] for site in (product, dense))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(a) == 3


def test_matrices_that_are_not_finite_have_no_spectrum() -> None:
    bad = torch.zeros(1, 4, 4)
    bad[0, 1, 2] = float("nan")
    assert Spectrum().see(Site(Key("w", (4, 4), "float32"), bad, torch.zeros(4, 4))) == {}


@pytest.mark.parametrize(
    ("shape", "side", "wanted"),
    [((8, 8), 8, True), ((9, 9), 8, False), ((128, 8), 8, True), ((129, 8), 8, False), ((8,), 8, False),
     ((4, 1), 8, False), ((2, 2, 2), 8, False), ((2, 2), 0, False)],
)  # fmt: skip
def test_the_size_limit(shape: tuple[int, ...], side: int, wanted: bool) -> None:
    assert small_enough(Key("w", shape, "float32"), side) is wanted
