"""Quadratic surrogates and fronts: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.core.errors import WeightsmithError
from weightsmith.search.fronts import front, pick, preferences
from weightsmith.search.surrogate import LINKS, Surrogate, design, fit, unknowns

DRAWN = np.random.default_rng(0)
POINTS = {tasks: DRAWN.uniform(0, 1, (4 * unknowns(tasks), tasks)) for tasks in (1, 2, 3)}


@pytest.mark.parametrize("tasks", POINTS)
@pytest.mark.parametrize("link", LINKS)
def test_a_quadratic_behind_its_link_is_found_again(link: str, tasks: int):
    truth = Surrogate(link, np.random.default_rng(tasks).normal(size=unknowns(tasks)))
    found = fit(POINTS[tasks], truth(POINTS[tasks]), link)
    elsewhere = np.random.default_rng(9).uniform(-0.5, 1.5, (50, tasks))
    assert found.converged
    assert np.abs(found(elsewhere) - truth(elsewhere)).max() < 1e-6
    assert found.error < 1e-6


def test_the_order_of_the_terms():
    assert design(np.array([[2.0, 3.0, 5.0]])).tolist() == [[4, 9, 25, 6, 10, 15, 2, 3, 5, 1]]


def test_the_identity_is_ordinary_least_squares():
    noisy = np.random.default_rng(3).normal(size=len(POINTS[2]))
    terms = design(POINTS[2])
    wanted = np.linalg.solve(terms.T @ terms, terms.T @ noisy)
    assert np.allclose(fit(POINTS[2], noisy, "identity").coefficients, wanted, rtol=1e-8)


def test_the_least_squares_are_after_the_link():
    noise = 0.05 * np.random.default_rng(4).normal(size=len(POINTS[2]))
    metrics = np.clip(0.5 + 0.3 * POINTS[2][:, 0] - 0.2 * POINTS[2][:, 1] + noise, 0.02, 0.98)
    found, terms = fit(POINTS[2], metrics, "sigmoid"), design(POINTS[2])
    p = found(POINTS[2])
    assert np.abs(terms.T @ ((p - metrics) * p * (1 - p))).max() < 1e-6  # the gradient of the sum of squares
    before = Surrogate("sigmoid", np.linalg.lstsq(terms, LINKS["sigmoid"].inverse(metrics), rcond=None)[0])
    assert ((p - metrics) ** 2).sum() < ((before(POINTS[2]) - metrics) ** 2).sum()
    assert 0.02 < found.error < 0.1  # what was left out is predicted to the noise


def test_saturated_metrics_do_not_run_away():
    metrics = (POINTS[1][:, 0] > 0.5).astype(float)
    found = fit(POINTS[1], metrics)
    assert np.isfinite(found.coefficients).all()
    assert np.isfinite(found(POINTS[1])).all()


@pytest.mark.parametrize(
    ("points", "metrics", "link", "text"),
    [
        (
            np.zeros((5, 2)),
            np.full(5, 0.5),
            "sigmoid",
            "5 points are too few for 2 tasks; evaluate at least 6, better 12",
        ),
        (np.tile([[0.1, 0.2]], (8, 1)), np.full(8, 0.5), "sigmoid", "the points determine 1 of 6 unknowns"),
        (
            POINTS[1],
            np.full(12, 83.0),
            "sigmoid",
            "83 is outside the range of sigmoid, 0 to 1; divide percentages by 100",
        ),
        (POINTS[1], np.full(12, -0.1), "softplus", "-0.1 is outside the range of softplus, 0 to inf"),
        (POINTS[1], np.full(12, np.nan), "sigmoid", "a point or a metric is not a finite number"),
        (POINTS[1], np.full(11, 0.5), "sigmoid", r"one metric for each, got \[12, 1\] and \[11\]"),
        (POINTS[1], np.full(12, 0.5), "sigmoids", "unknown link 'sigmoids'; did you mean 'sigmoid'"),
    ],
)
def test_bad_points(points: np.ndarray, metrics: np.ndarray, link: str, text: str):
    with pytest.raises(WeightsmithError, match=text):
        fit(points, metrics, link)


def test_a_front_holds_what_nothing_dominates():
    t = np.linspace(-1, 2, 301)
    scores = np.stack([-((t - 0) ** 2), -((t - 1) ** 2)], 1)  # optima at 0 and 1: the front is [0, 1]
    kept = t[front(scores)]
    assert kept.min() == pytest.approx(0)
    assert kept.max() == pytest.approx(1)
    assert len(kept) == 101
    assert front(np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0], [0.0, 1.0]])).tolist() == [0, 1, 2]


def test_a_preference_picks_from_the_front():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    assert [pick(scores, w) for w in ((1, 0), (0, 1), (1, 1))] == [0, 1, 2]
    assert preferences("math=2, code=1", ["code", "math", "prose"]) == [1.0, 2.0, 0.0]
    for words, text in (("maths=1", "unknown score 'maths'; did you mean 'math'"), ("math=x", "is 'x', not a number")):
        with pytest.raises(WeightsmithError, match=text):
            preferences(words, ["code", "math"])
    with pytest.raises(WeightsmithError, match="expected 2 weights >= 0, one above 0"):
        pick(scores, (0, 0))
