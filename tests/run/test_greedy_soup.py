"""The greedy soup on a quadratic, where every merge's score is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import weightsmith
from weightsmith.core.errors import RecipeError
from weightsmith.ops.greedy import greedy

POINTS = {"far": [4.0, 4.0], "left": [-1.0, 0.0], "right": [1.2, 0.0], "up": [0.0, 1.5]}
"""The score of w is -|w|^2: left -1, right -1.44, up -2.25, far -32."""

MODELS = {name: {"w": torch.tensor(point)} for name, point in POINTS.items()}


def score(merged: dict[str, torch.Tensor]) -> float:
    return -float(merged["w"].square().sum())


def test_kept_where_the_score_does_not_fall() -> None:
    soup = weightsmith.greedy_soup(MODELS, score)
    # left: -1; with right (0.1, 0): -0.01; with up (0.067, 0.5): worse; with far: worse.
    assert soup.members == ("left", "right")
    assert soup.score == pytest.approx(-0.01)
    assert [(t[0][-1], t[2]) for t in soup.trials] == [("left", True), ("right", True), ("up", False), ("far", False)]
    assert soup.trials[2][1] == pytest.approx(-((0.2 / 3) ** 2 + 0.25))
    assert isinstance(soup.merged, dict)
    assert torch.allclose(soup.merged["w"], torch.tensor([0.1, 0.0]))


def test_given_scores_decide_the_order_and_save_evaluations(tmp_path: Path) -> None:
    asked: list[dict[str, torch.Tensor]] = []

    def evaluate(merged: dict[str, torch.Tensor]) -> float:
        asked.append(merged)
        return score(merged)

    given = {"far": -1.0, "left": -3.0, "right": -4.0, "up": -2.0}
    soup = weightsmith.greedy_soup(MODELS, evaluate, given, out=tmp_path / "soup")
    assert [t[0][-1] for t in soup.trials] == ["far", "up", "left", "right"]
    assert soup.members == ("far",), "no merge scores -1 or better"
    assert len(asked) == 3
    assert soup.merged == tmp_path / "soup"
    assert load_file(tmp_path / "soup/model.safetensors")["w"].tolist() == POINTS["far"]


def test_equal_scores_are_kept_and_go_in_order() -> None:
    trials = greedy([1.0, 2.0, 2.0], lambda members: 2.0)
    assert [t.members for t in trials] == [(1,), (1, 2), (1, 2, 0)]
    assert all(t.kept for t in trials)


def test_any_method_may_merge() -> None:
    base = {"w": torch.zeros(2)}
    soup = weightsmith.greedy_soup(MODELS, score, method="task_arithmetic", base=base, lambda_=0.5)
    assert soup.members[0] == "left"
    assert isinstance(soup.merged, dict)
    assert torch.allclose(soup.merged["w"], sum(MODELS[n]["w"] for n in soup.members) * torch.tensor(0.5))


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"left": 1.0}, "no score is given for 'far'"),
        (dict.fromkeys([*MODELS, "lift"], 1.0), "no model is called 'lift'; did you mean 'left'"),
        ({**dict.fromkeys(MODELS, 1.0), "up": math.nan}, r"the score of models 3 \(counted from 0\) is NaN"),
    ],
)
def test_scores_that_do_not_fit(scores: Any, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        weightsmith.greedy_soup(MODELS, score, scores)


def test_no_models() -> None:
    with pytest.raises(RecipeError, match="no models to merge"):
        weightsmith.greedy_soup({}, score)
