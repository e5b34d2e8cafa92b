"""Averages and task arithmetic: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import build, merge, sites

from kit import noise, refusal, remarks
from weightsmith.core.kernel import WeightedSum
from weightsmith.methods.keep import Keep
from weightsmith.methods.linear import Linear
from weightsmith.methods.multislerp import Multislerp
from weightsmith.methods.task_arithmetic import TaskArithmetic

BASE = {"w": noise(4, 5)}
EXPERTS = {f"e{i}": {"w": BASE["w"] + 0.1 * noise(4, 5, seed=i + 1)} for i in range(3)}


def test_linear_is_the_weighted_mean():
    a, b, c = (e["w"].double() for e in EXPERTS.values())
    got = merge(EXPERTS, "linear", weight=(1.0, 2.0, -0.5))["w"]
    assert torch.allclose(got.double(), (a + 2 * b - 0.5 * c) / 2.5, rtol=1e-6, atol=1e-7)
    got = merge(EXPERTS, "linear", weight=(1.0, 2.0, -0.5), normalize=False)["w"]
    assert torch.allclose(got.double(), a + 2 * b - 0.5 * c, rtol=1e-6, atol=1e-6)


def test_task_arithmetic_with_lambda_one_over_n_is_the_average():
    average = merge(EXPERTS, "average")["w"]
    assert torch.allclose(merge(EXPERTS, "task_arithmetic", base=BASE, **{"lambda": 1 / 3})["w"], average, atol=1e-6)
    assert torch.allclose(merge(EXPERTS, "task_arithmetic", base=BASE, normalize=True)["w"], average, atol=1e-6)


def test_lambda_zero_gives_the_base_and_one_expert_itself():
    assert torch.equal(merge(EXPERTS, "task_arithmetic", base=BASE, **{"lambda": 0.0})["w"], BASE["w"])
    one = {"e0": EXPERTS["e0"]}
    assert torch.allclose(merge(one, "task_arithmetic", base=BASE)["w"], one["e0"]["w"], rtol=1e-6, atol=1e-7)
    assert torch.equal(merge(one, "linear")["w"], one["e0"]["w"])


def test_task_arithmetic_is_linear_in_its_weights():
    def at(*weight: float) -> torch.Tensor:
        return merge(EXPERTS, "task_arithmetic", base=BASE, weight=weight)["w"]

    assert torch.allclose(at(0.5, 0.5, 1.0), 0.5 * at(1.0, 0.0, 1.0) + 0.5 * at(0.0, 1.0, 1.0), atol=1e-6)


def test_negation_and_analogy():
    tau = EXPERTS["e0"]["w"] - BASE["w"]
    got = merge({"e0": EXPERTS["e0"]}, "task_arithmetic", base=BASE, weight=-0.3)["w"]
    assert torch.allclose(got, BASE["w"] - 0.3 * tau, atol=1e-6)
    got = merge(EXPERTS, "task_arithmetic", base=BASE, weight=(1, 1, -1))["w"]
    a, b, c = (e["w"] for e in EXPERTS.values())
    assert torch.allclose(got, BASE["w"] + (a - BASE["w"]) + (b - c), atol=1e-6)


@pytest.mark.parametrize("cls", [Linear, TaskArithmetic])
def test_weights_that_sum_to_zero_cannot_be_normalized(cls):
    assert refusal(cls(weight=(1.0, -1.0), normalize=False), 2) is None
    problem = refusal(cls(weight=(1.0, -1.0), normalize=True), 2)
    assert problem == "weights 1, -1 sum to zero, which cannot be normalized; set normalize: false"
    assert refusal(cls(weight=0, normalize=True), 3)


@pytest.mark.parametrize("cls", [Linear, TaskArithmetic, Multislerp])
def test_negative_weights_are_normalized_with_care(cls):
    problem = refusal(cls(weight=(-1.0, -0.5), normalize=True), 2)
    assert problem == "weights -1, -0.5 sum to -1.5: normalizing turns all their signs around; set normalize: false"
    assert refusal(cls(weight=(-1.0, -0.5), normalize=False), 2) is None
    assert refusal(cls(weight=(1.0, -0.9), normalize=True), 2) is None
    assert remarks(cls(weight=(1.0, -0.9), normalize=True), 2) == ["normalized, the weights are 10, -9"]
    assert remarks(cls(weight=(1.0, -0.9), normalize=False), 2) == []
    assert remarks(cls(weight=(1.0, 0.0), normalize=True), 2) == []
    assert remarks(cls(weight=(1.0, -1.0), normalize=True), 2) == []


def test_what_the_fused_kernels_are_told():
    assert Linear(weight=(1.0, 3.0)).fused(2) == WeightedSum((1.0, 3.0), divisor=4.0)
    assert TaskArithmetic(lambda_=0.5).fused(2) == WeightedSum((1.0, 1.0), scale=0.5, deltas=True)


def test_keep_takes_the_base_or_else_the_first_model():
    assert torch.equal(merge(EXPERTS, "keep", base=BASE)["w"], BASE["w"])
    assert torch.equal(merge(EXPERTS, Keep())["w"], EXPERTS["e0"]["w"])


def test_float64_stays_float64():
    wide = {n: {"w": e["w"].double()} for n, e in EXPERTS.items()}
    assert build("linear", {}).merge(sites(wide)["w"]).dtype == torch.float64
