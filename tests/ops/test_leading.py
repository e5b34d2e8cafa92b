"""Large float32 matrices: as exact as stated, whatever their spectrum; what float32 cannot settle goes to float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weightsmith
from kit import noise
from weightsmith.ops import spectral
from weightsmith.ops.leading import LARGE, eigh, gram, leading_space
from weightsmith.ops.spectral import Svd, orthogonal_sum, polar, polar_of_large, top_svd

SIZE, K = 320, 40


def planted(values: Tensor, columns: int = SIZE, seed: int = 0) -> Tensor:
    """A float32 matrix with these singular values."""
    size = len(values)
    u, v = (torch.linalg.qr(noise(n, size, seed=seed + i).double()).Q for i, n in enumerate((size, columns)))
    return ((u * values) @ v.T).float()


PLACES = torch.arange(SIZE, dtype=torch.float64)
SPECTRA = {
    "power law": (1 + PLACES / 8) ** -0.7,
    "steep": (1 + PLACES / 8) ** -1.5,
    "cliff": torch.where(PLACES < K, 1.0, 0.1) * (1 + PLACES / SIZE),
    "noise": torch.linspace(2, 0.01, SIZE, dtype=torch.float64),
    "nearly equal at the cut": torch.where((PLACES - K).abs() <= 3, 0.3 + 1e-7 * PLACES, (1 + PLACES / 8) ** -0.7),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("columns", [SIZE, 500])
def test_the_leading_part_is_found(spectrum: str, columns: int):
    values = SPECTRA[spectrum].sort(descending=True).values
    a = planted(values, columns)
    for matrix in (a, a.T.contiguous()):
        quick = spectral._top_of_large(matrix, K, 0.0)
        assert quick is not None
        assert float((quick.s / values[:K] - 1).abs().max()) < 1e-4
        # The best approximation of rank K, to the last digits of float32: what is left over is no larger.
        left = float((matrix.double() - quick.product).square().sum())
        best = float(values[K:].square().sum())
        assert left <= best + 1e-5 * float(values[:K].square().sum())
        for side in (quick.u, quick.v):
            assert torch.allclose(side.T @ side, torch.eye(K, dtype=torch.float64), atol=1e-4)


def test_where_the_spectrum_falls_a_krylov_space_is_enough_and_else_it_is_left(monkeypatch: pytest.MonkeyPatch):
    seen = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: seen.append(len(a)) or original(a))
    for spectrum, whole in (("power law", False), ("cliff", False), ("noise", True)):
        leading_space(gram(planted(SPECTRA[spectrum])), K)
        assert (SIZE in seen) == whole, (spectrum, seen)
        seen.clear()


def test_what_float32_cannot_settle_is_decomposed_in_float64():
    low = noise(SIZE, 10) @ noise(10, SIZE, seed=1)
    assert spectral._top_of_large(low, K, 1e-6) is None
    assert top_svd(low, K, 1e-6).s.numel() == 10
    deep = planted(10.0 ** (-PLACES / 8))  # the last wanted is 1e-5 of the first
    assert spectral._top_of_large(deep, K, 0.0) is None
    assert top_svd(torch.zeros(SIZE, SIZE), K).s.numel() == 0


@pytest.mark.parametrize("columns", [SIZE, 500])
def test_equal_singular_values(columns: int):
    """One block is then all of its Krylov space; the next would be rounding noise."""
    equal = planted(torch.ones(SIZE), columns)
    u, s, v = top_svd(equal, K)
    assert torch.allclose(s, torch.ones(K, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(u.T @ u, torch.eye(K, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(equal.double() @ v, u * s, atol=1e-5)


@pytest.mark.parametrize("equal", [8, 24])
def test_clusters_wider_than_a_block_are_found_whole(equal: int):
    """A Krylov space of one block holds as many copies of an equal singular value as the block has columns."""
    values = SPECTRA["power law"].clone()
    values[5 : 5 + equal] = values[5]
    values = values.sort(descending=True).values
    a = planted(values)
    quick = spectral._top_of_large(a, K, 0.0)
    assert quick is not None
    assert float((quick.s / values[:K] - 1).abs().max()) < 1e-4


def test_when_all_is_exact():
    a = planted(SPECTRA["power law"])
    assert spectral._top_of_large(a.double(), K, 0.0) is None
    assert spectral._top_of_large(a[: LARGE - 1], K, 0.0) is None
    assert spectral._top_of_large(a, SIZE // 2 + 1, 0.0) is None
    assert spectral._top_of_large(a.clone().requires_grad_(), K, 0.0) is None


def test_scale_does_not_matter_and_the_bytes_are_the_same_every_time():
    a = planted(SPECTRA["power law"])
    one, tiny = top_svd(a, K), top_svd(a * 2.0**-70, K)
    assert torch.equal(one.u, top_svd(a.clone(), K).u)
    assert torch.equal(one.u, tiny.u)
    assert torch.equal(one.s, tiny.s * 2.0**70)
    wide = a.double()
    assert torch.equal(top_svd(wide, K).s, top_svd(wide * 2.0**-700, K).s * 2.0**700)


def test_gram():
    a = noise(600, 40)
    assert torch.allclose(gram(a), a @ a.T, atol=1e-5)
    assert torch.equal(gram(a), gram(a).T)


@pytest.mark.parametrize("weakest", [0.5, 1e-2, 1e-4])
def test_polar_factors_keep_their_weak_directions(weakest: float):
    values = torch.logspace(0, torch.tensor(weakest).log10().item(), 300, dtype=torch.float64)
    x = planted(values, 400).T.contiguous()
    got, want = polar_of_large(x).double(), polar(x.double())
    assert float((got - want).norm() / want.norm()) < 5e-5 + 1e-8 / weakest
    assert torch.allclose(got.T @ got, torch.eye(300, dtype=torch.float64), atol=1e-4 + 1e-7 / weakest)


def test_polar_factors_drop_directions_of_nothing():
    q = torch.linalg.qr(noise(400, 150)).Q
    twice = torch.cat([q, q], 1)
    assert torch.allclose(polar_of_large(twice), twice / 2**0.5, atol=1e-5)


def straightforward(deltas: list[Tensor]) -> Tensor:
    """TSV-M as published: a whole SVD of every task vector and of both stacks."""
    k = min(deltas[0].shape) // len(deltas)
    found = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    u = torch.cat([f.U[:, :k] for f in found], 1)
    v = torch.cat([f.Vh[:k] for f in found], 0)
    s = torch.cat([f.S[:k] for f in found])
    pu, _, qu = torch.linalg.svd(u, full_matrices=False)
    pv, _, qv = torch.linalg.svd(v, full_matrices=False)
    return ((pu @ qu) * s) @ (pv @ qv)


def test_tsvm_of_large_matrices_is_that_of_whole_decompositions():
    deltas = [planted(SPECTRA["power law"], 384, seed=10 * i) for i in range(8)]
    base = torch.zeros(SIZE, 384)
    got = weightsmith.merge({f"e{i}": {"w": d} for i, d in enumerate(deltas)}, "tsvm", {"w": base})["w"].double()
    want = straightforward([d.double() for d in deltas])
    assert float((got - want).norm() / want.norm()) < 5e-4


def test_orthogonal_sum_in_float32():
    parts = [
        Svd(torch.linalg.qr(noise(400, 70, seed=i)).Q.double(), torch.rand(70).double(),
            torch.linalg.qr(noise(330, 70, seed=9 + i)).Q.double())
        for i in range(4)
    ]  # fmt: skip
    exact, quick = orthogonal_sum(parts), orthogonal_sum(parts, dtype=torch.float32)
    assert (exact.dtype, quick.dtype) == (torch.float64, torch.float32)
    assert float((quick - exact).norm() / exact.norm()) < 2e-5


@pytest.mark.parametrize("seed", [1, 6, 7, 10, 14, 25, 31, 36])
def test_zero_rows_among_strong_and_weak_ones_are_decomposed(seed: int) -> None:
    """As in the change of an embedding of which few tokens were seen; LAPACK's float32 eigh gives up on these."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(256, 256, generator=generator) * torch.logspace(0, -3, 256)[:, None]
    matrix[torch.randperm(256, generator=generator)[:152]] = 0
    matrix *= torch.rand(256, 1, generator=generator) ** 4
    values, vectors = eigh(gram(matrix))
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose(vectors.T @ vectors, torch.eye(256), atol=1e-5)
    found = top_svd(matrix, 64)
    wanted = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(found.s.double(), wanted[: len(found.s)], rtol=1e-3)
