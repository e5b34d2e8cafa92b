"""Karcher mean: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from driver import every, merge
from torch import Tensor

from kit import noise, refusal
from weightsmith.methods.karcher import Karcher

X = [noise(5, 4, seed=i) for i in range(7)]


def karcher(*tensors: Tensor, **parameters) -> Tensor:
    return merge({f"e{i}": {"w": x} for i, x in enumerate(tensors)}, "karcher", cut=every(2), **parameters)["w"]


def test_copies_come_back_and_so_does_one_model():
    assert torch.allclose(karcher(X[0], X[0], X[0]), X[0], atol=1e-6)
    assert torch.allclose(karcher(X[0]), X[0], atol=1e-6)
    assert torch.allclose(karcher(X[0], 3 * X[0]), 2 * X[0], atol=1e-6)


def on_arc(angle: float) -> Tensor:
    return torch.tensor([math.cos(angle), math.sin(angle)])


def test_on_one_arc_it_is_the_mean_of_the_angles():
    """Unlike the normalised mean, which is nearer to the crowd."""
    angles = [0.0, 0.1, 1.3]
    got = karcher(*(on_arc(a) for a in angles), max_iter=50)
    assert torch.allclose(got, on_arc(sum(angles) / 3), atol=1e-6)
    start = karcher(*(on_arc(a) for a in angles), max_iter=0)
    assert not torch.allclose(start, got, atol=1e-3)
    assert torch.allclose(start, torch.nn.functional.normalize(sum(on_arc(a) for a in angles), dim=0), atol=1e-6)
    weighted = karcher(*(on_arc(a) for a in angles), weight=(1.0, 1.0, 2.0), max_iter=50)
    assert torch.allclose(weighted, on_arc((0.1 + 2.6) / 4), atol=1e-6)


def test_the_pulls_cancel_at_the_mean_and_lengths_are_averaged():
    tensors = [X[1], 2 * X[2], 0.5 * X[3], X[4]]
    got = karcher(*tensors, max_iter=200, tol=1e-9).double()
    assert float(got.norm()) == pytest.approx(sum(float(x.norm()) for x in tensors) / 4, rel=1e-6)
    m = got / got.norm()
    pull = torch.zeros_like(m)
    for x in tensors:
        u = x.double() / x.double().norm()
        along = (u * m).sum().clamp(-1, 1)
        pull += along.acos() / (1 - along**2).sqrt() * (u - along * m)
    assert float(pull.norm()) < 1e-5


def test_nearly_parallel_tensors_keep_their_angles():
    a, step = X[5].double(), X[6].double()
    step -= (step * a).sum() / a.square().sum() * a
    near = [(a + e * step).float() for e in (-1e-4, 0.0, 1e-4)]
    assert torch.allclose(karcher(*near), near[1], atol=1e-6)


def test_any_scale_and_tensors_of_zeros():
    plain = karcher(X[1], X[2])
    for scale in (1e-20, 1e20):
        assert torch.allclose(karcher(X[1] * scale, X[2] * scale) / scale, plain, rtol=1e-4, atol=1e-6)
    # Zeros have no direction, but a length.
    assert torch.allclose(karcher(X[1], torch.zeros(5, 4)), X[1] / 2, atol=1e-6)
    assert karcher(torch.zeros(3), torch.zeros(3)).abs().max() == 0


def test_opposite_directions_give_the_first():
    assert torch.allclose(karcher(X[1], -X[1]), X[1], atol=1e-6)


def test_weights_of_zero_are_refused():
    assert "sum to zero" in str(refusal(Karcher(weight=0.0), 2, has_base=False))
