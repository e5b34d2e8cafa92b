"""TSV merge: closed forms."""

from __future__ import annotations

from functools import partial

import driver
import torch

from kit import noise
from weightsmith.methods.tsvm import Tsvm

delta = partial(driver.delta, "tsvm")


def test_orthogonal_tasks_of_low_rank_are_added_exactly():
    q, r = torch.linalg.qr(noise(8, 8)).Q, torch.linalg.qr(noise(10, 10, seed=1)).Q
    one = q[:, :3] @ torch.diag(torch.tensor([5.0, 3.0, 1.0])) @ r[:, :3].T
    two = q[:, 3:5] @ torch.diag(torch.tensor([4.0, 2.0])) @ r[:, 3:5].T
    assert torch.allclose(delta(one, two), one + two, atol=1e-4)


def test_singular_values_are_those_that_were_kept():
    changes = [noise(6, 7, seed=i) for i in range(3)]
    kept = torch.cat([torch.linalg.svdvals(c)[:2] for c in changes]).sort(descending=True).values
    assert torch.allclose(torch.linalg.svdvals(delta(*changes)), kept, atol=1e-4)


def test_experts_have_factors_of_their_own():
    a, b = noise(6, 6), noise(6, 6, seed=1)
    assert torch.allclose(delta(a, b, scaling=(1.0, 3.0)), delta(a, 3 * b), atol=1e-5)
    assert torch.allclose(delta(a[0], b[0], scaling=(0.6, 2.0)), (0.6 * a[0] + 2 * b[0]) / 2, atol=1e-6)
    few_rows = [noise(2, 9, seed=i) for i in range(3)]  # 2 // 3 = 0 triplets
    assert torch.allclose(delta(*few_rows), sum(few_rows) / 3, atol=1e-6)


def test_more_than_two_dimensions_are_merged_as_matrices_on_request():
    changes = [noise(3, 6, 8, seed=i) for i in range(2)]
    each = torch.stack([delta(*(c[i] for c in changes), scaling=0.7) for i in range(3)])
    assert torch.allclose(delta(*changes, beyond="slices", scaling=0.7), each, atol=1e-6)
    deep = [c.reshape(1, 3, 6, 8) for c in changes]
    assert torch.allclose(delta(*deep, beyond="slices", scaling=0.7), each[None], atol=1e-6)
    joined = delta(*(c.reshape(3, 48) for c in changes)).reshape(3, 6, 8)
    assert torch.allclose(delta(*changes, beyond="flatten"), joined, atol=1e-6)
    few = [noise(2, 6, 8, seed=i) for i in range(3)]  # two rows for three models: no triplet each
    assert torch.allclose(delta(*few, beyond="flatten"), sum(few) / 3, atol=1e-6)
    assert not torch.allclose(delta(*few, beyond="slices"), sum(few) / 3, atol=1e-2)


def test_a_zero_task_vector_leaves_the_others_alone():
    change = noise(6, 6)
    u, s, vt = torch.linalg.svd(change)
    assert torch.allclose(delta(change, torch.zeros(6, 6)), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)


def test_nearly_equal_experts_give_one_of_them_truncated():
    """Differences within rounding have no directions of their own."""
    change = noise(6, 6)
    u, s, vt = torch.linalg.svd(change)
    for nearly in (change, change * (1 + 1e-7 * noise(6, 6, seed=1))):
        assert torch.allclose(delta(change, nearly), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-4)


def test_ranks_are_counted_in_integers():
    assert Tsvm()._rank(49, 49) == 1
    assert Tsvm(rank_fraction=0.1)._rank(30, 4) == 3
    assert Tsvm(rank_fraction=0.1)._rank(39, 4) == 3


def test_how_bases_are_made_orthogonal():
    changes = [noise(9, 12, seed=i) for i in range(3)]
    assert torch.allclose(delta(*changes, orthogonalise="svd"), delta(*changes), atol=1e-6)
    kept = [torch.linalg.svd(c.double(), full_matrices=False) for c in changes]
    summed = sum((u[:, :3] * s[:3]) @ vt[:3] for u, s, vt in kept)
    plain = delta(*changes, orthogonalise="none")
    assert torch.allclose(plain.double(), summed, atol=1e-5)
    assert not torch.allclose(plain, delta(*changes), atol=1e-2)


def test_factors_of_zero_and_below():
    changes = [noise(9, 12, seed=i) for i in range(2)]
    turned = delta(*changes, scaling=(1.0, -0.5))
    assert torch.allclose(turned, delta(changes[0], -0.5 * changes[1]), atol=1e-5)
    assert torch.allclose(delta(*changes, scaling=(1.0, 0.0)), delta(changes[0], 0 * changes[1]), atol=1e-6)
