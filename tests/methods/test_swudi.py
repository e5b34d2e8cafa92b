"""Spectral WUDI: the closed form, its limits, and the flow it stands for."""

from __future__ import annotations

from functools import partial

import driver
import pytest
import torch

from kit import noise

delta = partial(driver.delta, "swudi")


def quadratic(taus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C and D, float64."""
    taus = taus.double()
    unit = [t / t.norm() for t in taus]
    return sum(u.T @ u for u in unit), sum(t @ u.T @ u for t, u in zip(taus, unit, strict=True))


STARTS = {"sum": lambda t: t.sum(0), "mean": lambda t: t.mean(0), "zero": lambda t: torch.zeros_like(t[0])}
START = pytest.mark.parametrize("start", STARTS)
SHAPE = pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 30)], ids=["wide", "tall", "very wide"])


@START
@SHAPE
def test_the_published_formula(start, shape):
    taus = torch.stack([noise(*shape, seed=i) for i in range(3)])
    c, d = quadratic(taus)
    values, q = torch.linalg.eigh(c)
    values = values.clamp(min=1e-8)
    f = 1 - torch.exp(-values * 7)
    f[: shape[1] - int(shape[1] * 0.6 + 0.999)] = 0
    m0 = STARTS[start](taus).double()
    expected = m0 - (m0 @ q * f) @ q.T + (d @ q * (f / values)) @ q.T
    got = delta(*taus, time=7, rank_ratio=0.6, init=start)
    assert torch.allclose(got, expected.float(), atol=1e-5)


@pytest.mark.parametrize(("fall", "far"), [(0.5, 1e-5), (2.0, 1e-4)], ids=["settled", "weak directions"])
def test_large_matrices_are_computed_in_float32(fall, far):
    taus = torch.stack([noise(260, 270, seed=i) * (1 + torch.arange(270) / 8) ** -fall for i in range(3)])
    c, d = quadratic(taus)
    values, q = torch.linalg.eigh(c)
    values[: 270 - int(270 * 0.65 + 0.999)] = torch.inf
    m0 = taus.double().sum(0)
    way = (d - m0 @ c) @ (q / values) @ q.T
    got = delta(*taus, time="inf").double() - m0
    assert float((got - way).norm() / way.norm()) < far


@START
@SHAPE
def test_no_time_gives_the_start(start, shape):
    taus = torch.stack([noise(*shape, seed=i) for i in range(3)])
    assert torch.allclose(delta(*taus, time=0, init=start), STARTS[start](taus), atol=1e-6)


@START
def test_much_time_is_no_filter_and_the_minimiser(start):
    taus = torch.stack([noise(7, 6, seed=i) for i in range(3)])
    assert torch.allclose(delta(*taus, time=1e6, init=start), delta(*taus, time="inf", init=start), atol=1e-6)
    c, d = quadratic(taus)
    least = delta(*taus, time="inf", rank_ratio=1.0, init=start).double()
    assert torch.allclose(least @ c, d, atol=1e-5)


def test_it_is_gradient_flow():
    taus = torch.stack([noise(6, 9, seed=i) for i in range(3)])
    c, d = quadratic(taus)
    merged = taus.double().sum(0)
    for _ in range(4000):  # a quarter of the gradient 2 (M C - D) per unit of dt = 1 / 2000
        merged = merged - (merged @ c - d) / 2000
    assert torch.allclose(delta(*taus, time=2, rank_ratio=1.0), merged.float(), atol=2e-3)


def test_one_expert_comes_back_from_every_start_but_zero():
    change = noise(6, 9)
    for parameters in [{"init": "sum"}, {"init": "mean", "time": "inf"}, {"init": "sum", "rank_ratio": 0.1}]:
        assert torch.equal(delta(change, **parameters), change)
    tall = noise(9, 6)
    assert torch.allclose(delta(tall, init="zero", time="inf", rank_ratio=1.0), tall, atol=1e-5)


def test_at_least_one_direction_takes_part():
    taus = torch.stack([noise(6, 9, seed=i) for i in range(3)])
    few = delta(*taus, rank_ratio=1e-4, time="inf") - taus.sum(0)
    assert torch.linalg.matrix_rank(few, atol=1e-4) == 1
