"""Slerp: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from driver import every, merge

from kit import refusal
from weightsmith.methods.slerp import Slerp

A, B = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]])


def at(t: float, a: torch.Tensor = A, b: torch.Tensor = B, step: int = 1) -> torch.Tensor:
    return merge({"e": {"w": b}}, "slerp", base={"w": a}, t=t, cut=every(step))["w"]


def test_end_points_and_the_middle_of_a_right_angle():
    assert torch.equal(at(0.0), A)
    assert torch.allclose(at(1.0), B, atol=1e-7)
    assert torch.allclose(at(0.5), (A + B) * math.sqrt(0.5))


def test_unit_vectors_stay_on_the_sphere_at_even_angles():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2.0), math.sin(2.0)])
    for t in (0.25, 0.5, 0.75):
        assert torch.allclose(at(t, a, b), torch.tensor([math.cos(2 * t), math.sin(2 * t)]), atol=1e-6)


def test_nearly_parallel_tensors_take_the_straight_line_at_any_scale():
    a = torch.ones(4, 4)
    b = a + 0.01 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e30, 1e-30):
        assert torch.allclose(at(0.3, a * scale, b * scale), (0.7 * a + 0.3 * b) * scale, rtol=1e-6)
        assert torch.allclose(at(0.3, a * scale, -b * scale), (0.7 * a - 0.3 * b) * scale, rtol=1e-5)


def test_two_models_without_a_base_and_vectors_of_zeros():
    assert torch.equal(merge({"a": {"w": A}, "b": {"w": B}}, "slerp", t=0.3)["w"], at(0.3))
    assert torch.allclose(at(0.5, torch.zeros(2, 2)), B * math.sqrt(0.5))


@pytest.mark.parametrize(
    ("count", "has_base", "good"), [(1, True, True), (2, False, True), (2, True, False), (1, False, False)]
)
def test_the_number_of_models(count, has_base, good):
    problem = refusal(Slerp(), count, has_base=has_base)
    assert (problem is None) is good
    if problem:
        words = "a base and 2" if has_base else "no base and 1"
        assert problem.endswith(f"without a base; the recipe has {words} models")
