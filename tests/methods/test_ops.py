"""Sums, noise and thin factorisations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit import noise
from weightsmith.ops.combine import disjoint, elect_sign
from weightsmith.ops.noise import bernoulli, uniform_bits
from weightsmith.ops.reduce import block_sums, pairwise_sum, row_sums
from weightsmith.ops.spectral import polar, qr_core, top_svd


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 64, 1001])
def test_sums_are_exact_for_integers_and_close_for_floats(length):
    whole = torch.arange(length, dtype=torch.float32)
    assert float(pairwise_sum(whole)) == length * (length - 1) / 2
    values = noise(3, length)
    assert torch.allclose(pairwise_sum(values), values.double().sum(-1), rtol=1e-12, atol=1e-12)


def test_row_sums_do_not_depend_on_the_cut():
    values = noise(13, 5, 3)
    assert torch.equal(row_sums(values), torch.cat([row_sums(values[:4]), row_sums(values[4:5]), row_sums(values[5:])]))
    assert float(block_sums(values)) == pytest.approx(float(values.double().sum()))
    assert float(block_sums(torch.tensor(2.5))) == 2.5


def test_any_part_of_a_noise_stream_is_that_part_of_the_whole():
    whole = uniform_bits(1, "w", "math", "dare", 0, 100)
    for offset, count in [(0, 1), (1, 7), (7, 2), (8, 8), (9, 40), (63, 37), (100, 0)]:
        assert np.array_equal(uniform_bits(1, "w", "math", "dare", offset, count), whole[offset : offset + count])


def test_noise_streams_are_known_forever():
    """A change here changes what every recorded seed means."""
    assert uniform_bits(0, "w", "math", "dare", 0, 3).tolist() == KNOWN


KNOWN = [4137946111, 77560786, 831783033]


def test_drops_are_known_forever():
    assert bernoulli(0, "w", "math", "dare", 0, 24, 0.5).nonzero()[0].tolist() == DRAWN


DRAWN = [0, 2, 3, 4, 5, 8, 10, 11, 18, 19, 22, 23]


def test_every_part_of_the_key_makes_another_stream():
    streams = [
        uniform_bits(*key, 0, 8).tolist()
        for key in [(0, "w", "a", "s"), (1, "w", "a", "s"), (0, "v", "a", "s"), (0, "w", "b", "s"), (0, "w", "a", "t")]
    ]
    assert len({tuple(s) for s in streams}) == 5


def test_bernoulli_is_fair_and_certain_at_the_ends():
    n, p = 200_000, 0.3
    kept = bernoulli(0, "w", "a", "s", 0, n, p).sum()
    assert abs(kept - n * p) < 4 * (n * p * (1 - p)) ** 0.5
    assert bernoulli(0, "w", "a", "s", 0, 1000, 1.0).all()
    assert not bernoulli(0, "w", "a", "s", 0, 1000, 0.0).any()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4)])
def test_top_svd_equals_the_full_one(shape):
    matrix = noise(*shape)
    for k in (1, 3, 9):
        u, s, v = top_svd(matrix, k)
        full = torch.linalg.svd(matrix.double())
        assert torch.allclose(s, full.S[:k], rtol=1e-9)
        best = (full.U[:, :k][:, : s.numel()] * s) @ full.Vh[: s.numel()]
        assert torch.allclose((u * s) @ v.T, best, atol=1e-9)


def test_top_svd_leaves_out_directions_of_singular_value_zero():
    u, s, v = top_svd(torch.outer(torch.arange(4.0), torch.ones(6)), 3)
    assert (u.shape, s.shape, v.shape) == ((4, 1), (1,), (6, 1))
    assert top_svd(torch.zeros(4, 6), 2).s.numel() == 0
    assert float(top_svd(torch.eye(3) * 1e-30, 2).s[0]) == pytest.approx(1e-30)


def test_top_svd_is_accurate_for_small_singular_values():
    q = torch.linalg.qr(noise(8, 8).double()).Q
    wanted = torch.tensor([1, 1e-3, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12, 1e-13], dtype=torch.float64)
    u, s, v = top_svd((q * wanted) @ q.T.flip(0), 5)
    assert torch.allclose(s, wanted[:5], rtol=1e-4)
    assert torch.allclose(u.T @ u, torch.eye(5, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(v.T @ v, torch.eye(5, dtype=torch.float64), atol=1e-10)


def test_polar_is_the_nearest_matrix_with_orthonormal_columns():
    x = noise(7, 4).double()
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(polar(x), u @ vt, atol=1e-12)
    assert torch.allclose(polar(x.T), (u @ vt).T, atol=1e-12)  # more columns than rows: orthonormal rows


def test_polar_shares_repeated_columns_out_evenly():
    x = torch.linalg.qr(noise(7, 2).double()).Q
    assert torch.allclose(polar(torch.cat([x, x], 1)), torch.cat([x, x], 1) / 2**0.5, atol=1e-12)


def test_qr_core_is_the_svd_of_the_product():
    left, right = noise(8, 3), noise(6, 3, seed=1)
    u, s, v = qr_core(left, right)
    assert torch.allclose((u * s) @ v.T, left.double() @ right.double().T, atol=1e-12)
    assert torch.allclose(s, torch.linalg.svdvals(left.double() @ right.double().T)[:3])


def test_sign_rules():
    votes = torch.tensor([[3.0, -2.0, 1.0, 1.0], [-1.0, -2.0, -1.0, 1e-30], [-1.0, 5.0, 0.0, -4.0]])
    assert elect_sign(votes, "mass").tolist() == [1, 1, 0, -1]
    assert elect_sign(votes, "count").tolist() == [-1, -1, 0, 1]
    norms = [1.0, 10.0, 0.0]  # the third has no voice
    assert elect_sign(votes, "normfrac", norms).tolist() == [1, -1, 1, 1]
    assert elect_sign(votes, "normmass", norms).tolist() == [1, -1, 1, 1]


def test_disjoint_aggregates():
    votes, signs = torch.tensor([[3.0, -2.0], [1.0, 2.0], [-5.0, -4.0]]), torch.tensor([1.0, -1.0])
    assert disjoint(votes, signs, [1, 1, 1], "sum").tolist() == [4, -6]
    assert disjoint(votes, signs, [1, 1, 1], "mean").tolist() == [2, -3]
    assert disjoint(votes, signs, [1, 1, 1], "max").tolist() == [3, -4]
    assert disjoint(votes, signs, [3, 1, 5], "mean").tolist() == [1, -0.75]
    assert disjoint(votes, torch.zeros(2), [1, 1, 1], "mean").tolist() == [0, 0]
