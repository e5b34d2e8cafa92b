"""NuSLERP: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from driver import every, merge
from torch import Tensor

from kit import noise

X = [noise(6, 4, seed=i) for i in range(8)]


def nuslerp(a: Tensor, b: Tensor, weight, base: Tensor | None = None, **parameters) -> Tensor:
    ground = None if base is None else {"w": base}
    return merge({"a": {"w": a}, "b": {"w": b}}, "nuslerp", base=ground, weight=weight, cut=every(2), **parameters)["w"]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    angle = math.acos(float((a.double() * b).sum() / a.double().norm() / b.double().norm()))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_weights_that_sum_to_one_are_slerp(t):
    got = nuslerp(X[0], X[1], (1 - t, t))
    assert torch.allclose(got, slerp(X[0], X[1], t), atol=1e-6)
    assert torch.allclose(got, merge({"a": {"w": X[0]}, "b": {"w": X[1]}}, "slerp", t=t)["w"], atol=1e-6)
    assert torch.allclose(nuslerp(X[0], X[1], (4 - 4 * t, 4 * t)), got, atol=1e-6)


def test_weights_that_cancel_meet_in_the_middle():
    assert torch.allclose(nuslerp(X[0], X[1], (1.0, -1.0)), slerp(X[0], X[1], 0.5), atol=1e-6)


def test_slices_have_angles_of_their_own():
    a, b, w = X[0], X[1], (0.7, 0.5)
    t = 0.5 / 1.2
    rows = nuslerp(a, b, w, flatten=False)
    assert torch.allclose(rows, torch.stack([slerp(x, y, t) for x, y in zip(a, b, strict=True)]), atol=1e-5)
    columns = nuslerp(a, b, w, flatten=False, row_wise=True)
    assert torch.allclose(columns, torch.stack([slerp(x, y, t) for x, y in zip(a.T, b.T, strict=True)]).T, atol=1e-5)
    assert torch.equal(nuslerp(a, b, w, row_wise=True), nuslerp(a, b, w))
    vector = nuslerp(a[0], b[0], w, flatten=False, row_wise=True)
    assert torch.allclose(vector, slerp(a[0], b[0], t), atol=1e-6)
    cube = nuslerp(a.reshape(2, 3, 4), b.reshape(2, 3, 4), w, flatten=False)
    assert torch.allclose(cube.reshape(6, 4), rows, atol=1e-6)


def test_with_a_base_it_works_on_the_changes():
    base = X[7]
    got = nuslerp(base + X[0], base + X[1], (0.3, 0.7), base=base)
    assert torch.allclose(got - base, slerp(X[0], X[1], 0.7), atol=1e-6)


@pytest.mark.parametrize("flatten", [True, False])
def test_parallel_and_opposite_vectors_take_the_line_at_any_scale(flatten):
    for scale in (1.0, 1e-20, 1e20):
        a = X[0] * scale
        assert torch.allclose(nuslerp(a, 3 * a, (0.75, 0.25), flatten=flatten), 1.5 * a, rtol=1e-5)
        assert torch.allclose(nuslerp(a, -3 * a, (0.5, 0.5), flatten=flatten), -a, rtol=1e-5)
        # Without a direction: a right angle.
        assert torch.allclose(nuslerp(a, 0 * a, (0.5, 0.5), flatten=flatten), a * math.sqrt(0.5), rtol=1e-5)
