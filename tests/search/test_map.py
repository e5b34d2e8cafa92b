"""MAP as a sampler: fronts of surrogates, nested and Bayesian, and its laws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.pantry import stocked, tree
from weightsmith.core.errors import RecipeError
from weightsmith.search.api import search
from weightsmith.search.fronts import front
from weightsmith.search.genes import Gene
from weightsmith.search.pareto import angles, bin_scores, pareto, spread_over, vector
from weightsmith.search.samplers.by_surrogate import Map
from weightsmith.search.space import Space

SPACE = {"weight": {"low": 0.0, "high": 1.0, "per": "model"}}


def test_the_front_of_two_parabolas_is_the_segment_between_their_tops() -> None:
    points, values = pareto([lambda x: -((x[:, 0] - 0.2) ** 2), lambda x: -((x[:, 0] - 0.7) ** 2)],
                            np.zeros(1), np.ones(1), 0)  # fmt: skip
    assert len(front(values)) == len(values)
    assert points.min() == pytest.approx(0.2, abs=1e-3)
    assert points.max() == pytest.approx(0.7, abs=1e-3)
    assert np.diff(np.sort(points[:, 0])).max() < 0.02
    chosen = spread_over(values, 5)
    assert len(set(chosen)) == 5
    assert {int(values[:, 0].argmax()), int(values[:, 1].argmax())} <= set(chosen)


def test_angles_and_back() -> None:
    for size in (2, 3, 5):
        points = np.random.default_rng(size).random((20, size))
        phi, radius = angles(points)
        assert phi.shape == (20, size - 1)
        assert np.allclose(vector(phi, radius), points)
        assert (phi >= 0).all()
        assert (phi <= math.pi / 2 + 1e-12).all()


def test_bins_without_a_point_have_the_largest_score() -> None:
    phi = np.array([[0.1], [0.2], [1.5]])
    scores = bin_scores(phi, np.array([1.0, 3.0, 0.5]), 4, 0.5, np.random.default_rng(0))
    assert scores[3] == pytest.approx(0.5)
    assert scores[1] == scores[2] == scores.max() >= 2.0


class Flat(Space):
    def __init__(self, count: int, names: str = "abcdef") -> None:
        self.genes = tuple(Gene(f"weight/{names[i]}", 0.0, 1.0) for i in range(count))

    def recipe(self, point: Any) -> Any:
        raise AssertionError


def sampler(count: int, goals: tuple[str, ...], budget: int, **options: Any) -> Map:
    return Map(Flat(count), goals, 0, options, Path(), budget)


def answer(found: Map, metric: Any, batch: int = 5) -> list[dict[str, float]]:
    asked: list[dict[str, float]] = []
    while (points := found.ask(batch)) and len(asked) < found.budget:
        asked += points
        found.tell(points, [metric(np.array(list(p.values()))) for p in points])
        found.restore(found.state())
    return asked


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def concave(c: np.ndarray) -> list[float]:
    return [sigmoid(2 * c[0] - c[0] ** 2 - c[1] * c[0]), sigmoid(2 * c[1] - 1.5 * c[1] ** 2 - c[1] * c[0])]


def test_surrogates_of_noiseless_quadratics_are_exact() -> None:
    found = sampler(2, ("a", "b"), 20, points=12)
    asked = answer(found, concave)
    assert len(asked) == 20
    assert list(asked[0].values()) == [1.0, 0.0]
    assert list(asked[1].values()) == [0.0, 1.0]
    test = np.random.default_rng(5).random((30, 2))
    for goal, model in enumerate(found.surrogates()):
        assert model(test) == pytest.approx([concave(c)[goal] for c in test], abs=1e-6)
    points, values = found.predicted()
    assert ((points >= 0) & (points <= 1)).all()
    assert len(front(values)) == len(values)
    assert len(found.notes()) == 2


def test_symmetric_goals_have_symmetric_fronts() -> None:
    found = sampler(2, ("a", "b"), 12, points=12)
    answer(found, lambda c: [sigmoid(c[0] - c[0] ** 2 - c[1] ** 2), sigmoid(c[1] - c[0] ** 2 - c[1] ** 2)])
    _, values = found.predicted()
    for column in (0, 1):
        assert values[:, column].max() == pytest.approx(sigmoid(0.25), abs=1e-3)


def test_rounds_ask_where_the_fit_errs_and_losses_are_minimised() -> None:
    found = sampler(3, ("a", "b"), 40, points=12, rounds=2, update=6)
    found.signs = [-1.0, -1.0]
    asked = answer(found, lambda c: [-float(np.abs(c - 0.3).sum() + 0.1), -float(((c - 0.6) ** 2).sum() + 0.1)])
    assert len(asked) == 40
    norms = [np.linalg.norm(list(p.values())) for p in asked[12:24]]
    assert all(0.2 - 1e-9 <= n <= 0.8 + 1e-9 for n in norms)
    assert [found._link(0), found._link(1)] == ["softplus", "softplus"]


def test_nested_pairs_models_and_for_two_is_plain() -> None:
    tasks = ("a", "b", "c")

    def metric(c: np.ndarray) -> list[float]:
        return [sigmoid(3 * c[i] - 2 * c[i] ** 2 - 0.3 * (c.sum() - c[i])) for i in range(3)]

    found = sampler(3, tasks, 50, nested=True)
    asked = answer(found, metric)
    assert len(asked) == 3 + 2 * 20 + 1
    last = np.array(list(asked[-1].values()))
    rest = max(sum(metric(np.full(3, x))) for x in np.linspace(0, 1, 101))
    assert sum(metric(last)) > 0.98 * rest
    two = sampler(2, ("a", "b"), 30, nested=True)
    chosen = np.array(list(answer(two, concave)[-1].values()))
    plain = sampler(2, ("a", "b"), 30, points=20)
    answer(plain, concave)
    _, values = plain.predicted()
    assert sum(concave(chosen)) == pytest.approx(values.sum(1).max(), abs=1e-3)


@pytest.mark.parametrize(
    ("count", "goals", "budget", "options", "text"),
    [
        (3, ("a", "b"), 9, {}, "needs 10, better 20"),
        (3, ("a", "b"), 30, {"points": 9}, "needs 10"),
        (3, ("a", "b"), 30, {"link": "probit"}, "link = 'probit'; expected one of"),
        (3, ("a", "b"), 30, {"link": {"c": "sigmoid"}}, "unknown goal"),
        (3, ("a", "b"), 90, {"nested": True}, "a goal for each model"),
        (2, ("a", "b"), 20, {"nested": True}, "nested takes 23"),
        (2, ("a", "b"), 20, {"points": 0}, "whole number"),
    ],
)
def test_faults(count: int, goals: tuple[str, ...], budget: int, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        sampler(count, goals, budget, **options)


def test_a_metric_outside_its_link_is_said_at_once() -> None:
    found = sampler(2, ("a", "b"), 20)
    points = found.ask(1)
    with pytest.raises(RecipeError, match=r"45 is outside the range of link sigmoid.*divide percentages"):
        found.tell(points, [[45.0, 0.5]])


def test_collinear_points_are_refused() -> None:
    found = sampler(2, ("a", "b"), 12, points=12)
    found.told = [([x, x], [0.5, 0.5]) for x in np.linspace(0, 1, 12)]
    with pytest.raises(RecipeError, match="determine 3 of 6 unknowns"):
        found.surrogates()


def test_failures_are_left_out_of_the_fit() -> None:
    found = sampler(2, ("a", "b"), 14, points=13)
    answer(found, lambda c: None if c[0] > 0.9 else concave(c))
    test = np.random.default_rng(5).random((10, 2))
    assert found.surrogates()[0](test) == pytest.approx([concave(c)[0] for c in test], abs=1e-6)


def test_a_whole_search(tmp_path: Path) -> None:
    pantry = stocked(tmp_path)
    goals, link = {"a": "max", "b": "min"}, {"a": "identity", "b": "softplus"}
    file = tree(pantry, space=SPACE, goals=goals, sampler={"map": {"points": 12, "link": link}}, evaluations=18)
    made = search(file, tmp_path / "out")
    assert len(made.search.trials) == 18
    assert any("surrogate of a (identity): error on left-out points" in note for note in made.notes)
    assert (tmp_path / "out" / "front.html").exists()
    later = {trial.number for trial in made.front if trial.number >= 12}
    assert len(later) >= 3  # what was predicted is on the real front
    again = search(file, tmp_path / "out")
    assert [t.point for t in again.search.trials] == [t.point for t in made.search.trials]
