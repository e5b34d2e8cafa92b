"""Laws of the methods that merge matrix by matrix."""

from __future__ import annotations

import pytest
import torch
from driver import delta

import weightsmith
from kit import noise

METHODS = ("tsvm", "r_tsvm", "iso_c", "iso_cts", "swudi", "aswudi", "wudi", "optmerge")
each = pytest.mark.parametrize("method", METHODS)


@each
def test_scaling_multiplies_the_merged_change(method):
    changes = [noise(9, 12, seed=i) for i in range(3)]
    for factor in (0.5, 0.0):
        got, whole = delta(method, *changes, scaling=factor), delta(method, *changes, scaling=1.0)
        assert torch.allclose(got, factor * whole, atol=1e-6)


@each
@pytest.mark.parametrize("shape", [(5,), (), (3, 2, 2)])
def test_tensors_that_are_not_matrices_get_the_scaled_mean(method, shape):
    a, b = noise(*shape), noise(*shape, seed=1)
    assert torch.allclose(delta(method, a, b, scaling=0.6), 0.6 * (a + b) / 2, atol=1e-6)


@each
def test_nothing_changed_gives_nothing(method):
    zero = torch.zeros(6, 9)
    assert torch.equal(delta(method, zero, zero), zero)
    assert torch.equal(delta(method, zero), zero)


@pytest.mark.parametrize("method", ["wudi", "swudi", "aswudi"])
def test_an_expert_without_changes_has_no_weight(method):
    a, b = noise(6, 9), noise(6, 9, seed=1)
    assert torch.allclose(delta(method, a, torch.zeros(6, 9), b), delta(method, a, b), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("tsvm", {"rank_fraction": 1.0}), ("wudi", {"lr": 0.1}), ("aswudi", {}), ("optmerge", {"variant": "lora"}),
     ("optmerge", {"variant": "full"}), ("knots", {"shared": "left"}), ("knots", {"shared": "right"})],
)  # fmt: skip
def test_one_expert_comes_back_with_other_parameters_too(method, parameters):
    change = noise(6, 9)
    assert torch.allclose(delta(method, change, **parameters), change, atol=1e-5)
    assert torch.allclose(delta(method, change, scaling=0.5, **parameters), change / 2, atol=1e-5)


@pytest.mark.parametrize("method", ["wudi", "optmerge", "swudi", "aswudi"])
def test_half_precision_is_widened_before_any_arithmetic(method):
    """In float16 steps of 1e-5 would round to nothing."""
    given = {"optmerge": {"variant": "lora", "lr": 1e-3}, "wudi": {"lr": 1e-3}}.get(method, {})
    base = {"w": noise(8, 9).half()}
    experts = {f"e{i}": {"w": base["w"] + (0.3 * noise(8, 9, seed=i + 1)).half()} for i in range(3)}
    got = weightsmith.merge(experts, method, base=base, **given)["w"]
    wide = {n: {"w": e["w"].float()} for n, e in experts.items()}
    want = weightsmith.merge(wide, method, base={"w": base["w"].float()}, **given)["w"]
    assert got.dtype == torch.float16
    assert torch.equal(got, want.half())
