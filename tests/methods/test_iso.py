"""Isotropic merging: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import delta
from torch.linalg import svdvals

from kit import noise
from weightsmith.methods.iso_cts import IsoCts
from weightsmith.ops.spectral import polar, polar_by_iteration

CHANGES = [noise(12, 16, seed=i) for i in range(3)]


@pytest.mark.parametrize("solver", ["eigh", "iterate"])
def test_all_directions_are_equally_strong_and_the_nuclear_norm_stays(solver):
    found = svdvals(delta("iso_c", *CHANGES, solver=solver))
    assert torch.allclose(found, found[0].expand(12), rtol=1e-4)
    assert torch.allclose(found.sum(), svdvals(sum(CHANGES)).sum(), rtol=1e-5)


@pytest.mark.parametrize("solver", ["eigh", "iterate"])
def test_a_multiple_of_an_orthogonal_matrix_comes_back(solver):
    change = 3 * torch.linalg.qr(noise(8, 8)).Q
    assert torch.allclose(delta("iso_c", change, solver=solver), change, atol=1e-5)


SPECTRA = {
    "flat": torch.ones(256),
    "falling": 10 ** (-5 * torch.arange(256) / 256),
    "low rank": (torch.arange(256) < 16).float(),
    "zero": torch.zeros(256),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("turned", [False, True])
def test_large_matrices_in_float32_are_flattened_as_in_float64(spectrum, turned):
    u, v = torch.linalg.qr(noise(300, 256)).Q, torch.linalg.qr(noise(256, 256, seed=1)).Q
    change = 1e-3 * (u * SPECTRA[spectrum]) @ v
    change = change.T.contiguous() if turned else change
    want = delta("iso_c", change.double())
    assert delta("iso_c", change).dtype == torch.float32
    assert (delta("iso_c", change) - want).norm() <= 1e-4 * want.norm()
    kept = torch.linalg.matrix_rank(change.double(), rtol=1e-6)
    assert (svdvals(delta("iso_c", change)) > 0.5 * svdvals(want)[0]).sum() == kept


def test_without_task_directions_iso_cts_is_iso_c():
    want = delta("iso_c", *CHANGES, scaling=0.7)
    assert torch.allclose(delta("iso_cts", *CHANGES, scaling=0.7, common_space_fraction=1.0), want, atol=1e-5)
    few_rows = [noise(2, 9, seed=i) for i in range(3)]
    assert torch.allclose(delta("iso_cts", *few_rows, common_space_fraction=0.0), delta("iso_c", *few_rows), atol=1e-5)


def test_iso_cts_is_flat_and_as_strong_as_what_it_keeps():
    """p = 12, T = 3, fraction 0.5: 6 common directions, 2 per task."""
    shared = torch.linalg.svd(sum(CHANGES).double(), full_matrices=False)
    u = shared.U[:, :6]
    own = [svdvals(c.double() - u @ (u.T @ c.double()))[:2] for c in CHANGES]
    strength = torch.cat([shared.S[:6], *own]).mean()
    found = svdvals(delta("iso_cts", *CHANGES, common_space_fraction=0.5).double())
    assert torch.allclose(found, strength.expand(12), rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "count", "fraction", "want"),
    [
        (16, 5, 0.3, (6, 2)),  # floor(4.8) = 4, round(12 / 5) = 2
        (8, 3, 0.0, (2, 2)),  # round(8 / 3) = 3 would be 9 of 8
        (10, 4, 0.0, (2, 2)),  # round(2.5) = 2: half to even
        (14, 4, 0.0, (2, 3)),  # round(3.5) = 4 would be 16 of 14
        (30, 4, 0.9, (26, 1)),
        (2, 3, 0.0, (2, 0)),
    ],
)
def test_how_many_directions(size, count, fraction, want):
    assert IsoCts(common_space_fraction=fraction)._ranks(size, count) == want


def test_rank_deficient_sums_are_flattened_within_their_rank():
    low = noise(10, 2) @ noise(2, 14, seed=1)
    for method in ("iso_c", "iso_cts"):
        found = svdvals(delta(method, low, 0.5 * low))
        assert torch.allclose(found[:2], found[0].expand(2), rtol=1e-5), method
        assert float(found[2]) < 1e-5 * float(found[0]), method
    kept = svdvals(delta("iso_c", low, low, rank_tol=0.0))
    assert float(kept[5]) > 0.1 * float(kept[0]), "the authors' code: noise directions as strong as the rest"
    assert torch.equal(delta("iso_c", low, -low), torch.zeros(10, 14))


def test_the_iteration_agrees_with_the_decomposition():
    for shape in [(20, 20), (8, 30), (30, 8)]:
        matrix = noise(*shape)
        assert torch.allclose(polar_by_iteration(matrix).double(), polar(matrix), atol=1e-4)
        assert torch.allclose(polar(matrix, "svd"), polar(matrix), atol=1e-10)
    a, b = delta("iso_c", *CHANGES), delta("iso_c", *CHANGES, solver="iterate")
    assert float((a - b).norm() / a.norm()) < 1e-4
