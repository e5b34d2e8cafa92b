"""Multi-SLERP: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from driver import every, merge
from torch import Tensor

from kit import noise, refusal
from weightsmith.methods.multislerp import Multislerp

X = [noise(5, 4, seed=i) for i in range(10)]


def multi(*tensors: Tensor, base: Tensor | None = None, **parameters) -> Tensor:
    models = {f"e{i}": {"w": x} for i, x in enumerate(tensors)}
    ground = None if base is None else {"w": base}
    return merge(models, "multislerp", base=ground, cut=every(2), **parameters)["w"]


def the_long_way(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """With the step in the tangent space that the method leaves out."""
    x = torch.stack(tensors).double().reshape(len(tensors), -1)
    w = torch.tensor(weights).double()[:, None] / sum(weights)
    u = x / x.norm(dim=1, keepdim=True)
    m = (w * u).sum(0)
    m = m / m.norm()
    v = (w * (u - (u @ m)[:, None] * m)).sum(0)
    r = v.norm() + 1e-8
    out = (r.cos() * m + r.sin() * v / r) * (w[:, 0] * x.norm(dim=1)).sum()
    return out.float().reshape(tensors[0].shape)


def test_copies_come_back_and_so_does_one_model():
    assert torch.allclose(multi(X[0], X[0], X[0]), X[0], atol=1e-6)
    assert torch.equal(multi(X[0], weight=3.0), X[0])


def test_the_tangent_step_is_zero():
    tensors, weights = [X[1], 3 * X[2], X[3]], [0.4, 0.3, 0.8]
    assert torch.allclose(multi(*tensors, weight=tuple(weights)), the_long_way(tensors, weights), atol=1e-6)


def test_direction_and_length_are_averaged_apart():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert torch.allclose(multi(a, b), torch.full((1, 2), 4 * math.sqrt(0.5)))
    assert torch.allclose(
        multi(a, b, weight=(0.3, 0.1), normalize=False), torch.tensor([[3.0, 1.0]]) / math.sqrt(10) * 1.4
    )


def test_with_a_base_it_works_on_the_changes():
    base = X[9]
    got = multi(base + X[1], base + X[2], base=base) - base
    assert torch.allclose(got, multi(X[1], X[2]), atol=1e-6)


def test_models_that_cancel_are_summed():
    a = X[4]
    assert multi(a, -a).abs().max() == 0
    assert torch.allclose(multi(a, -3 * a), -a, atol=1e-6)
    # Here the directions cancel up to rounding only.
    assert torch.allclose(multi(a, 2 * a, -7 * a, weight=(1.0, 1.0, 2.0)), -11 / 4 * a, atol=1e-5)


def test_tiny_tensors_are_averaged():
    a, b = X[1] * 1e-20, X[2] * 1e-20
    assert torch.allclose(multi(a, b) * 1e20, (X[1] + X[2]) / 2)


def test_weights_that_cancel_are_refused():
    assert "sum to zero" in str(refusal(Multislerp(weight=(1.0, -1.0)), 2, has_base=False))
    assert refusal(Multislerp(weight=(1.0, -1.0), normalize=False), 2, has_base=False) is None


def test_eps_counts_as_in_the_reference():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    got = multi(a, b, eps=0.5)
    u = torch.tensor([[3 / 3.5, 5 / 5.5]])
    assert torch.allclose(got, u / u.norm() * 4 * math.cos(0.5), rtol=1e-6)
    assert float(got[0, 1] / got[0, 0]) == pytest.approx((5 / 5.5) / (3 / 3.5), rel=1e-6)
