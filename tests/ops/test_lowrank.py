"""Products of thin matrices against the same in full."""

from __future__ import annotations

import pytest
import torch

from kit import noise
from weightsmith.ops.lowrank import (
    Factors,
    agreed_mean,
    clamped,
    distance,
    drop,
    prune,
    rank_for,
    signed,
    size,
    split,
    stacked,
    svd_of_factors,
    widened,
)


def some(count: int, rows: int = 11, columns: int = 7) -> list[Factors]:
    return [Factors(noise(rows, r, seed=2 * r), noise(r, columns, seed=2 * r + 1)) for r in range(1, count + 1)]


def test_stacked_is_the_weighted_sum_at_the_sum_of_ranks() -> None:
    parts, weights = some(3), (0.5, -2.0, 1.5)
    found = stacked(parts, weights)
    assert found.rank == 6
    assert torch.allclose(found.product, sum(w * p.product for w, p in zip(weights, parts, strict=True)), atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(11, 7), (7, 11), (3, 20), (4, 4)])
def test_the_svd_of_factors_is_that_of_the_product(rows: int, columns: int) -> None:
    found = stacked(some(3, rows, columns), (1.0, 1.0, 1.0))
    full = torch.linalg.svdvals(found.b.double() @ found.a.double())
    cut = svd_of_factors(found)
    count = min(6, rows, columns)
    assert torch.allclose(cut.s, full[:count], atol=1e-10)
    assert torch.allclose(cut.product, found.b.double() @ found.a.double(), atol=1e-10)
    assert bool((cut.u.gather(0, cut.u.abs().argmax(0, keepdim=True)) > 0).all())


def test_what_cancels_leaves_no_rank() -> None:
    (one,) = some(1)
    assert svd_of_factors(stacked([one, one], (1.0, -1.0))).s.shape == (0,)
    assert svd_of_factors(stacked([one, one], (1.0, 2.0))).s.shape == (1,)
    assert signed(svd_of_factors(stacked([one, one], (1.0, -1.0)))).s.shape == (0,)


def test_even_and_uneven_splits_have_one_product() -> None:
    cut = svd_of_factors(stacked(some(3), (1.0, 1.0, 1.0)))
    for rank in (1, 4):
        even, uneven = split(cut, rank, even=True), split(cut, rank, even=False)
        assert torch.allclose(even.product, uneven.product, atol=1e-12)
        assert torch.allclose(even.b.norm(dim=0), even.a.norm(dim=1))
        assert torch.allclose(uneven.a @ uneven.a.T, torch.eye(rank, dtype=torch.float64), atol=1e-12)
        missed = float((even.product - cut.product).norm())
        assert missed == pytest.approx(float(cut.s[rank:].norm()))


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, 4),
        ({"rank": 2}, 2),
        ({"rank": 9}, 4),
        ({"floor": 1.0}, 2),
        ({"energy": 0.64}, 1),
        ({"energy": 0.65}, 2),
        ({"energy": 1.0}, 4),
        ({"energy": 1.0, "rank": 3}, 3),
    ],
)
def test_ranks(given: dict, want: int) -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 1.0])
    s[3] = 0.5
    square = 16 / 0.64 if "energy" in given and given["energy"] < 1 else float(s.square().sum())
    assert rank_for(s, square, **given) == want


def test_an_energy_out_of_reach_keeps_all() -> None:
    assert rank_for(torch.tensor([2.0, 1.0]), 100.0, energy=0.9) == 2
    assert rank_for(torch.zeros(0), 0.0, energy=0.9) == 0


def test_norms_without_the_product() -> None:
    one, other = some(4)[-1], some(3)[-1]
    assert size(one) == pytest.approx(float(one.product.double().norm()), rel=1e-6)
    want = float((one.product.double() - other.product.double()).norm())
    assert distance(one, other) == pytest.approx(want, rel=1e-6)
    near = Factors(one.b * (1 + 1e-6), one.a)
    assert distance(one, near) / size(one) == pytest.approx(1e-6, rel=0.1)  # a Gram matrix would lose this


def test_clamping_and_widening() -> None:
    found = Factors(torch.tensor([[1.0, -5.0]]), torch.tensor([[2.0], [0.5]]))
    cut = clamped(found, 2 / 3)  # of 0.5, 1, 2, 5 it is 2
    assert torch.equal(cut.b, torch.tensor([[1.0, -2.0]]))
    assert torch.equal(cut.a, found.a)
    assert torch.equal(widened(found, 5).product, found.product)
    assert widened(found, 5).rank == 5


def test_pruning_keeps_exactly_its_share() -> None:
    x = torch.tensor([[3.0, -1.0], [1.0, 2.0]])
    assert torch.equal(prune(x, 0.5), torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    assert torch.equal(prune(x, 0.75), torch.tensor([[3.0, -1.0], [0.0, 2.0]]))  # the first of equals
    assert torch.equal(prune(x, 0.2), torch.zeros(2, 2))
    assert torch.equal(prune(x, 1.0), x)


def test_dropping_keeps_the_mean() -> None:
    x = torch.ones(200, 200)
    found = drop(x, 0.25, 0, "m", "e")
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(found, drop(x, 0.25, 0, "m", "e"))
    for other in ((1, "m", "e"), (0, "n", "e"), (0, "m", "f")):
        assert not torch.equal(found, drop(x, 0.25, *other))
    assert not bool(drop(x, 0.0, 0, "m", "e").any())


@pytest.mark.parametrize(
    ("vote", "want"),
    [
        # columns: agreement; a draw (+ wins); two small against a large; zeros
        ("total", [1.5, 3.0, 4.0, 0.0]),
        ("frequency", [1.5, 3.0, -1.5, 0.0]),
        ("weighted", [1.5, -6.0, 4.0, 0.0]),  # 3 - 6 < 0: the weight decides
    ],
)
def test_votes(vote: str, want: list[float]) -> None:
    stack = torch.tensor([[1.0, 3.0, 4.0, 0.0], [1.0, -3.0, -1.0, 0.0], [0.0, 0.0, -1.0, 0.0]])
    assert agreed_mean(stack, (1.0, 2.0, 1.0), vote).tolist() == want
