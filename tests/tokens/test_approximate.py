"""Approximations of rows: closed forms and laws."""

from __future__ import annotations

import pytest
import torch

from weightsmith.ops.pursuit import inner_products, omp
from weightsmith.tokens.approximate import Rope, basis, interpolate, landmarks, pursue_with_rope


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_sum_of_k_orthogonal_atoms_is_found_exactly() -> None:
    atoms = torch.linalg.qr(randn(12, 12)).Q * torch.arange(1, 13).unsqueeze(1)
    wanted = torch.zeros(3, 12)
    wanted[0, [2, 7, 4]] = torch.tensor([1.0, -2.0, 0.5])
    wanted[1, [0, 1, 11]] = torch.tensor([3.0, 1.0, 1.0])
    wanted[2, [5, 6, 8]] = torch.tensor([-1.0, 1.0, 2.0])
    indices, coefficients = omp(wanted @ atoms, atoms, 3)
    found = torch.zeros(3, 12).scatter_(1, indices, coefficients.float())
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_residual_falls_with_k_and_is_orthogonal_to_what_was_taken() -> None:
    targets, atoms = randn(5, 20), randn(60, 20, seed=1)
    before = targets.norm(dim=1)
    for k in range(1, 21):
        indices, coefficients = omp(targets, atoms, k)
        left = targets - (coefficients.float().unsqueeze(1) @ atoms[indices]).squeeze(1)
        assert (left.norm(dim=1) <= before + 1e-5).all()
        assert (atoms[indices] @ left.unsqueeze(2)).abs().max() < 1e-4
        assert all(len(set(row)) == k for row in indices.tolist())
        before = left.norm(dim=1)
    assert before.max() < 1e-4  # as many atoms as dimensions


def test_more_atoms_than_dimensions_do_no_harm() -> None:
    targets, atoms = randn(4, 6), randn(30, 6, seed=1)
    indices, coefficients = omp(targets, atoms, 12)
    assert torch.allclose((coefficients.float().unsqueeze(1) @ atoms[indices]).squeeze(1), targets, atol=1e-4)
    assert coefficients.isfinite().all()
    twice = torch.cat([atoms, atoms])
    assert omp(targets, twice, 8)[1].isfinite().all()


@pytest.mark.parametrize(("count", "size", "k"), [(2100, 24, 16), (2500, 200, 48), (2049, 8, 12)])
def test_with_their_inner_products_the_same_atoms_are_taken(count: int, size: int, k: int) -> None:
    """Correlated atoms, some of them twice, more than once across the kernel's strips; k beyond the dimensions too."""
    atoms = randn(count, size, seed=2) + 2 * randn(1, size, seed=3)
    atoms[100:110] = atoms[:10] * 2
    targets = randn(9, size, seed=4) + randn(1, size, seed=3)
    slow, fast = omp(targets, atoms, k), omp(targets, atoms, k, inner_products(atoms))
    here = min(k, size) - 4  # beyond, what is left is rounding
    assert torch.equal(slow[0][:, :here], fast[0][:, :here])
    for indices, coefficients in (slow, fast):
        assert all(len(set(row)) == k for row in indices.tolist())
        assert coefficients.isfinite().all()
    rows = [(c.unsqueeze(1) @ atoms[i].double()).squeeze(1) for i, c in (slow, fast)]
    assert torch.allclose(rows[0], rows[1], atol=1e-4)


def test_an_anchor_is_its_own_nearest() -> None:
    anchors = randn(20, 8)
    indices, weights = interpolate(anchors[3:5], anchors, 1, "euclidean", "distance_proportional")
    assert indices.tolist() == [[3], [4]]
    assert weights.tolist() == [[1.0], [1.0]]
    indices, weights = interpolate(anchors[3:4] * 7, anchors, 2, "cosine", "distance_proportional")
    assert indices[0, 0] == 3
    assert weights[0, 0] > weights[0, 1]


def test_nearer_anchors_weigh_more_by_one_over_the_distance() -> None:
    anchors = torch.tensor([[1.0], [4.0], [100.0]])
    indices, weights = interpolate(torch.tensor([[2.0]]), anchors, 2, "euclidean", "distance_proportional")
    assert indices.tolist() == [[0, 1]]
    assert weights[0].tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("weights", ["barycentric", "least_squares"])
def test_fitted_weights_reach_what_lies_in_the_span(weights: str) -> None:
    anchors = randn(3, 5)
    goal = (0.2 * anchors[0] + 0.5 * anchors[1] + 0.3 * anchors[2]).unsqueeze(0)
    indices, found = interpolate(goal, anchors, 3, "euclidean", weights)
    assert torch.allclose(found[0][indices[0].argsort()], torch.tensor([0.2, 0.5, 0.3]).double(), atol=1e-5)
    outside, found = randn(1, 5, seed=3), interpolate(randn(1, 5, seed=3), anchors, 3, "euclidean", weights)[1]
    assert (float(found.sum()) == pytest.approx(1)) == (weights == "barycentric")
    assert outside.isfinite().all()


def test_landmarks_undo_a_rotation_and_a_shift() -> None:
    anchors = randn(40, 6)
    turn = torch.linalg.qr(randn(6, 6, seed=2)).Q
    new = randn(3, 6, seed=4)
    found = landmarks(anchors, anchors @ turn + 5)(new)
    assert torch.allclose(found.float(), new @ turn + 5, atol=1e-4)
    wide = torch.linalg.qr(randn(9, 6, seed=2)).Q.T  # into a wider space
    assert torch.allclose(landmarks(anchors, anchors @ wide)(new).float(), new @ wide, atol=1e-4)


def test_a_basis_carries_a_linear_map_over() -> None:
    anchors, turn = randn(50, 6), torch.linalg.qr(randn(6, 6, seed=2)).Q
    new = randn(3, 6, seed=4)
    assert torch.allclose(basis(anchors, anchors @ turn - 1, 8)(new).float(), new @ turn - 1, atol=1e-3)


def test_rope_turns_as_llama_does() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rows, rope = randn(1, 16), Rope(heads=2, base=100.0)
    frequencies = 100.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.cat([3.0 * frequencies] * 2).reshape(1, 1, 8)
    wanted, _ = apply_rotary_pos_emb(
        rows.reshape(1, 2, 1, 8), rows.reshape(1, 2, 1, 8), angles.cos(), angles.sin(), unsqueeze_dim=1
    )
    turned = rope.turned(rows, torch.tensor([3.0]))
    assert torch.allclose(turned, wanted.reshape(1, 16), atol=1e-5)
    small = torch.tensor([0.3])
    assert torch.allclose(rope.position(rows, rope.turned(rows, small)), small, atol=1e-4)


def test_a_turned_anchor_is_found_by_the_pursuit_with_rope() -> None:
    anchors, rope = torch.eye(8)[:3] * torch.tensor([[1.0], [2.0], [3.0]]), Rope(heads=1, base=10.0)
    anchors[:, 4:] += 0.1
    ours = randn(3, 8, seed=5)
    place = torch.tensor([0.25])
    goal = 2 * rope.turned(anchors[1:2], place)
    found = pursue_with_rope(goal, anchors, ours, 1, rope, rope)
    assert torch.allclose(found.float(), 2 * rope.turned(ours[1:2], place), atol=1e-3)
