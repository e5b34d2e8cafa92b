"""The predicted time: declared by every method, added up from tasks and bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from weightsmith.cli.show import roughly
from weightsmith.core.costs import Costs
from weightsmith.core.method import registered
from weightsmith.inputs.opened import Inputs
from weightsmith.inspect.catalogue import cost_at_7b, describe
from weightsmith.io.read.source import MemorySource
from weightsmith.plan.cost import AGAIN, READ, START, WRITE, stage_seconds
from weightsmith.plan.costs import UNKNOWN, costs_of
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import Recipe


def planned(method: Any, count: int = 2, **tensors: torch.Tensor) -> Plan:
    models = {f"m{i}": MemorySource(tensors, f"m{i}") for i in range(count)}
    recipe = Recipe.model_validate({"base": "base", "models": {n: n for n in models}, "method": method})
    return make_plan(recipe, sources=Inputs(MemorySource(tensors, "base"), models))


def calculating(plan: Plan) -> float:
    """Seconds without start and files."""
    assert plan.seconds is not None
    return plan.seconds - START - (READ * plan.read_bytes + WRITE * plan.write_bytes) / 1e9


@pytest.mark.parametrize("name", registered())
def test_every_method_declares_its_cost(name: str) -> None:
    cost = costs_of(registered()[name]).seconds
    assert cost is not None
    assert cost > 0 or name == "keep"
    assert "per model" in cost_at_7b(describe(registered()[name]))


def test_costs_add_up_over_stages_and_experts() -> None:
    one, w = registered(), torch.zeros(1000, 400)
    dare, ties = costs_of(one["dare"]).seconds, costs_of(one["ties"]).seconds
    assert dare is not None
    assert ties is not None
    alone = ["dare", {"ties": {"scope": "tensor", "zero_sign": "plus"}}]
    assert calculating(planned(alone, count=3, w=w)) == pytest.approx(3 * 4e-4 * (dare + ties))
    assert calculating(planned("keep", w=w)) == pytest.approx(0)


@pytest.mark.parametrize("name", ["magnitude", "breadcrumbs", "scale", "dare", "della", "agree"])
def test_what_was_measured_of_a_tensor_is_not_measured_again(name: str) -> None:
    """Only the filtering itself is done again for the three looks over the model: two for the cuts, one for signs."""
    w, own, ties = torch.zeros(1000, 400), *(costs_of(registered()[n]).seconds for n in (name, "ties"))
    assert own is not None
    assert ties is not None
    assert calculating(planned([name, "ties"], count=3, w=w)) == pytest.approx(3 * 4e-4 * (own + ties + 3 * AGAIN))


def test_the_cost_of_decompositions_grows_with_the_smaller_side() -> None:
    tsvm = costs_of(registered()["tsvm"]).seconds
    assert tsvm is not None
    wanted = 2 * 2e-3 * tsvm * 1000 / 768
    assert calculating(planned("tsvm", w=torch.zeros(1000, 2000))) == pytest.approx(wanted)
    assert calculating(planned("tsvm", w=torch.zeros(2000, 1000))) == pytest.approx(wanted)


def test_passes_read_again() -> None:
    plan = planned("ties", w=torch.zeros(1000, 400))
    assert plan.passes
    assert plan.read_bytes == 3 * 1_600_000 * (1 + plan.passes)


def test_a_method_without_a_figure_gives_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage_seconds(UNKNOWN, 1e9, 768) is None
    linear = registered()["linear"]
    monkeypatch.setattr(linear, "traits", replace(linear.traits, costs=Costs(scratch=0.5)))
    assert planned("linear", w=torch.zeros(3)).seconds is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.04, "2 s"),
        (14.4, "14 s"),
        (99, "99 s"),
        (119, "2 min"),
        (3000, "50 min"),
        (9000, "2.5 h"),
        (360_000, "100 h"),
    ],
)
def test_rough_durations(seconds: float, text: str) -> None:
    assert roughly(seconds) == text
