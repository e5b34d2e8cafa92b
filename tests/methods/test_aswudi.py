"""Adaptive spectral WUDI: how many directions its rules take."""

from __future__ import annotations

import math

import pytest
import torch
from driver import delta

from kit import noise
from weightsmith.methods.aswudi import RULES, count_directions


def spectrum(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rule", ["participation_sqrt", "participation", "entropy", "stable_rank"])
def test_one_large_eigenvalue_counts_as_one_and_nearly_equal_ones_as_all(rule):
    assert count_directions(spectrum(1.0, *[1e-14] * 7), rule, 1.0) in (1, 2)
    assert count_directions(spectrum(*[1.0] * 5, 0.9), rule, 1.0) == 6


def test_rules_on_a_known_spectrum():
    values = spectrum(9.0, 4.0, 1.0, 0.25)
    assert count_directions(values, "participation_sqrt", 1.0) == math.ceil(6.5**2 / 14.25)
    assert count_directions(values, "participation", 1.0) == math.ceil(14.25**2 / 98.0625)
    assert count_directions(values, "stable_rank", 1.0) == math.ceil(98.0625 / 81)
    p = values / 14.25
    assert count_directions(values, "entropy", 1.0) == math.ceil(math.exp(-float((p * p.log()).sum())))
    shares = {0.6: 1, 0.7: 2, 0.95: 3, 0.99: 4, 1.0: 4}
    assert {s: count_directions(values, "cumulative", 1.0, s) for s in shares} == shares
    assert count_directions(values, "none", 1.0) == 4


def test_gavish_donoho_counts_what_stands_out_of_the_median():
    values = spectrum(100.0, 81.0, *[1.0] * 7)
    square = math.sqrt((16 / 3) / (2 + math.sqrt(3)))  # lambda(1)^2 = 16 / 3
    half = math.sqrt((3 + 4 / (1.5 + math.sqrt(8.25))) / 0.75)
    for aspect, omega in [(1.0, square), (0.5, half)]:
        near = spectrum(100.0, (omega + 0.01) ** 2, (omega - 0.01) ** 2, *[1.0] * 4)
        assert count_directions(near, "gavish_donoho", aspect) == 2
    assert count_directions(values, "gavish_donoho", 0.5) == 2
    assert count_directions(spectrum(1, 1, 1), "gavish_donoho", 0.5) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(6, 9), (2, 30)])
def test_it_is_swudi_with_the_rules_count(rule, shape):
    taus = [noise(*shape, seed=i) for i in range(3)]
    gram = sum((t.double() / t.double().norm()).T @ (t.double() / t.double().norm()) for t in taus)
    values = torch.linalg.eigvalsh(gram).clamp(min=1e-8).flip(0)
    count = count_directions(values, rule, shape[0] / shape[1], 0.95)
    expected = delta("swudi", *taus, time="inf", rank_ratio=(count - 0.5) / shape[1])
    assert torch.allclose(delta("aswudi", *taus, rule=rule), expected, atol=1e-5)


def test_at_least_min_rank_directions():
    taus = [noise(6, 9, seed=i) for i in range(3)]
    few = delta("aswudi", *taus, rule="cumulative", share=1e-9)
    assert torch.linalg.matrix_rank(few - sum(taus), atol=1e-4) == 1
    more = delta("aswudi", *taus, rule="cumulative", share=1e-9, min_rank=4)
    assert torch.linalg.matrix_rank(more - sum(taus), atol=1e-4) == 4
    assert torch.isfinite(delta("aswudi", *taus, min_rank=50)).all()


def test_no_filter_and_sum_or_mean_differ_by_what_is_left_out():
    taus = torch.stack([noise(7, 6, seed=i) for i in range(3)])
    by_sum, by_mean = (delta("aswudi", *taus, rule="none", init=init) for init in ("sum", "mean"))
    assert torch.allclose(by_sum, by_mean, atol=1e-5)  # the minimiser, wherever it starts
