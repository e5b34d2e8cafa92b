"""What a stage declares: checks, types, what becomes of tensors that it does not cover, costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kit import refusal
from weightsmith import Linear, WeightMatching, merge
from weightsmith.core.checks import Case, Level, at_least, at_most, by_depth, dims, exactly, small_changes
from weightsmith.core.errors import RecipeError
from weightsmith.core.keys import Key
from weightsmith.core.method import Method, registered
from weightsmith.core.problem import Code
from weightsmith.plan.costs import UNKNOWN, costs_of, table


@pytest.mark.parametrize(
    ("check", "count", "said"),
    [
        (at_least(2), 1, "takes at least 2 models, not 1"),
        (at_most(1), 2, "takes 1 model, not 2"),
        (at_most(2), 3, "takes at most 2 models, not 3"),
        (exactly(2), 3, "takes 2 models, not 3"),
        (exactly(2), 2, None),
    ],
)
def test_models_are_counted(check: Any, count: int, said: str | None) -> None:
    assert [text for _, text, _ in check(None, Case(count))] == ([said] if said else [])


def test_tensors_of_other_dimensions_are_left() -> None:
    shapes = [(), (3,), (3, 3), (3, 3, 3)]
    left = [[v[:2] for v in dims(1, 2)(None, Case(2, key=Key("w", shape, "float32")))] for shape in shapes]
    assert left == [[(Level.LEAVE, "0-D tensors")], [], [], [(Level.LEAVE, "3-D tensors")]]
    assert [*dims(2)(None, Case(2))] == []  # of the recipe there is nothing to say


def test_depth_and_changes() -> None:
    assert [*by_depth(None, Case(2))] == []
    (said,) = by_depth(None, Case(2, blocks="there are none"))
    assert said == (Level.REFUSE, "works by depth, but there are none", Code.DEPTH)
    assert [*small_changes(None, Case(1, change=(0.04, 0.009)))] == []
    assert small_changes(None, Case(1, change=(0.04, 0.02)))


def test_a_stage_that_leaves_a_tensor_says_no_more_of_it() -> None:
    seen = []

    @dataclass(frozen=True)
    class Picky(Method):
        def check(self, case: Case) -> Any:
            seen.append(case.key)
            return ()

    Picky.traits = registered()["tsvm"].traits
    assert [verdict.level for verdict in Picky().verdicts(Case(2, key=Key("b", (3,), "float32")))] == [Level.LEAVE]
    assert seen == []
    assert refusal(Picky(), 2) is None
    assert seen == [None]


def test_a_header_with_an_unknown_word_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^mine: unknown trait 'check'; did you mean 'checks'\?$"):
        type("Mine", (Method,), {}, name="mine", check=())


def test_the_stage_elsewhere_gets_the_parameters_that_both_have() -> None:
    assert WeightMatching(weight=(1.0, 3.0)).elsewhere() == Linear(weight=(1.0, 3.0))
    experts = {"a": {"norm": torch.zeros(2)}, "b": {"norm": torch.ones(2)}}
    assert merge(experts, "weight_matching", weight={"a": 1.0, "b": 3.0})["norm"].tolist() == [0.75, 0.75]


def test_the_table_of_costs_covers_the_registry() -> None:
    assert table().keys() == registered().keys()
    assert all(costs_of(cls) == table()[name] for name, cls in registered().items())
    plugin = type("Plugin", (Method,), {"traits": registered()["linear"].traits.__class__("plugin")})
    assert costs_of(plugin) == UNKNOWN
