"""R-TSVM: laws of the reconstruction."""

from __future__ import annotations

import pytest
import torch
from driver import delta

from kit import noise
from weightsmith.methods.r_tsvm import RTsvm, outlier_share, zero_share

CHANGES = [noise(12, 40, seed=i) for i in range(3)]


def test_without_weights_and_adaptation_it_is_tsvm_bit_for_bit():
    for changes in (CHANGES, [noise(7, 11, seed=i) for i in range(3)], [noise(2, 9, seed=i) for i in range(3)]):
        got = delta("r_tsvm", *changes, weighting="none", rank_gamma=0.0, scaling=0.7)
        assert torch.equal(got, delta("tsvm", *changes, scaling=0.7))


@pytest.mark.parametrize("weighting", ["preserve", "suppress"])
def test_tasks_that_look_alike_give_tsvm(weighting):
    """The same entries in other places of their rows: equal statistics."""
    changes = [CHANGES[0].roll(i, 1) for i in range(3)]
    got = delta("r_tsvm", *changes, weighting=weighting)
    assert torch.allclose(got, delta("tsvm", *changes), atol=1e-5)


def test_statistics_do_not_depend_on_scale():
    change = CHANGES[0].clone()
    change[:, :20] = 0
    assert outlier_share(change * 2**-20, 2.0) == pytest.approx(outlier_share(change, 2.0), rel=1e-12)
    assert zero_share(change * 1e-6, 1e-5) == zero_share(change, 1e-5) == 0.5


def test_the_outlier_share_by_hand():
    row = torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1, 1, 11]])  # |x|: mean 2, std 3
    assert outlier_share(row, 2.9) == pytest.approx(11 / 20)
    assert outlier_share(row, 3.1) == 0.0
    assert outlier_share(torch.ones(3, 4), 3.0) == 0.0, "a constant row has none"


def test_zeros_lower_the_rank():
    method = RTsvm()
    assert method._ranks(90, 3, [0.0, 0.9, 0.5]) == [30, 3, 15]
    assert RTsvm(rank_gamma=0.0)._ranks(90, 3, [0.0, 0.9, 0.5]) == [30, 30, 30]
    assert method._ranks(90, 3, [1.0, 1.0, 1.0]) == [1, 1, 1]


@pytest.mark.parametrize("count", range(2, 65))
def test_ranks_fit_into_the_matrix(count):
    for size in (count, count + 1, 64, 100):
        if size < count:
            continue
        for stage in (RTsvm(), RTsvm(rank_base=1.0), RTsvm(rank_base=0.5, rank_min=size // count)):
            ranks = stage._ranks(size, count, [i / count for i in range(count)])
            assert sum(ranks) <= size
            assert min(ranks) >= stage.rank_min


def test_planted_outliers_move_the_weight():
    found = {"preserve": [], "suppress": []}
    for size in (5.0, 10.0, 20.0):
        planted = CHANGES[0].clone()
        planted[:, 0] = size
        shares = [outlier_share(c, 3.0) for c in (planted, *CHANGES[1:])]
        for weighting, weights in found.items():
            made = RTsvm(weighting=weighting)._weights(shares)
            assert sum(made) == pytest.approx(3)
            weights.append(made[0])
    assert found["preserve"] == sorted(found["preserve"])
    assert found["preserve"][0] < found["preserve"][-1]
    assert found["suppress"] == sorted(found["suppress"], reverse=True)
    assert found["suppress"][0] > found["suppress"][-1]


def test_weights_multiply_the_task_vectors():
    stage = RTsvm(outlier_sigma=1.0)
    weights = stage._weights([outlier_share(c, 1.0) for c in CHANGES])
    assert len(set(weights)) == 3
    got = delta("r_tsvm", *CHANGES, outlier_sigma=1.0)
    assert torch.allclose(got, delta("tsvm", *CHANGES, scaling=tuple(weights)), atol=1e-5)


def test_a_task_without_changes_is_left_out():
    u, s, vt = torch.linalg.svd(CHANGES[0].double(), full_matrices=False)
    got = delta("r_tsvm", CHANGES[0], torch.zeros(12, 40))
    want = (u[:, :6] * s[:6]) @ vt[:6]
    assert torch.allclose(got.double(), want, atol=1e-5), (got - want).abs().max()


def test_weights_are_capped():
    shares = [0.9, 0.01, 0.02]
    free, capped = RTsvm()._weights(shares), RTsvm(weight_cap=2.0)._weights(shares)
    assert free[0] > 2
    assert free[1] < 0.5
    assert capped == [2.0, 0.5, 0.5]
    assert RTsvm(weight_cap=1.0)._weights(shares) == [1.0] * 3
