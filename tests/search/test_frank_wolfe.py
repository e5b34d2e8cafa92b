"""Frank-Wolfe over a pool: closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kit import noise
from weightsmith.core.errors import WeightsmithError
from weightsmith.search.frank_wolfe import INITIAL, FrankWolfe

START = {n: noise(3, 2, seed=i) for i, n in enumerate("ab")}
POOL = {f"e{j}": {n: START[n] + 0.5 * noise(3, 2, seed=10 * j + i + 5) for i, n in enumerate("ab")} for j in range(3)}
Weights = dict[str, Tensor]


def readers(pool=POOL):
    return {name: state.__getitem__ for name, state in pool.items()}


def towards(target):
    """Gradient of 1/2 |w - target|^2."""
    return lambda weights: {n: weights[n] - target[n] for n in weights}


def loss(weights, target) -> float:
    return sum(float((weights[n] - target[n]).double().square().sum()) for n in target) / 2


def test_the_first_whole_step_ends_at_the_vertex():
    (step,) = FrankWolfe(step_size=1, scaling=1, iterations=1).run(START, readers(), towards(POOL["e1"]))
    assert set(step.chosen.values()) == {"e1"}
    assert step.size == 1
    for n in START:
        assert torch.allclose(step.weights[n], POOL["e1"][n], atol=1e-6)


def test_the_initial_vertex_stands_still():
    steps = list(
        FrankWolfe(iterations=3).run(START, readers(), towards({n: 2 * START[n] - POOL["e0"][n] for n in START}))
    )
    if all(set(s.chosen.values()) == {INITIAL} for s in steps):
        assert all(torch.equal(steps[-1].weights[n], START[n]) for n in START)
    away = {"only": {n: START[n] + 1 for n in START}}
    (step,) = FrankWolfe(iterations=1).run(START, readers(away), lambda w: {n: torch.ones_like(w[n]) for n in w})
    assert set(step.chosen.values()) == {INITIAL}
    assert step.gap == 0
    assert all(torch.equal(step.weights[n], START[n]) for n in START)


def test_a_convex_loss_falls_to_the_hull_and_the_gap_closes():
    target = {n: sum(POOL[m][n] for m in POOL) / 3 for n in START}
    steps = list(FrankWolfe(step_size=1, scaling=1, iterations=400).run(START, readers(), towards(target)))
    assert loss(steps[-1].weights, target) < 1e-2 * loss(START, target)
    assert steps[-1].gap < 0.05 * steps[0].gap
    for step in steps:
        assert step.gap >= -1e-6


@pytest.mark.parametrize("score", ["inner", "inner_delta"])
def test_an_irrelevant_vertex_is_never_chosen(score: str):
    target = POOL["e0"]
    with_noise = {**POOL, "far": {n: START[n] + 20 * (START[n] - target[n]) for n in START}}
    for granularity in ("task", "layer"):
        options = FrankWolfe(granularity, score, iterations=5)
        one, two = (list(options.run(START, readers(p), towards(target))) for p in (POOL, with_noise))
        assert all(torch.equal(one[-1].weights[n], two[-1].weights[n]) for n in START)


def test_each_layer_has_its_own_vertex_and_the_order_of_the_pool_is_nothing():
    target = {"a": POOL["e0"]["a"], "b": POOL["e2"]["b"]}
    options = FrankWolfe("layer", iterations=1)
    (step,) = options.run(START, readers(), towards(target))
    assert step.chosen == {"a": "e0", "b": "e2"}
    (other,) = options.run(START, readers(dict(reversed(POOL.items()))), towards(target))
    assert other.chosen == step.chosen
    assert all(torch.equal(step.weights[n], other.weights[n]) for n in START)


def test_without_a_gradient_a_tensor_stays():
    def gradient(weights: Weights) -> Weights:
        return {"a": weights["a"] - POOL["e1"]["a"], "b": torch.zeros_like(weights["b"]), "gone": torch.ones(1)}

    (step,) = FrankWolfe("layer", "cosine", iterations=1).run(START, readers(), gradient)
    assert step.chosen["b"] is None
    assert torch.equal(step.weights["b"], START["b"])
    assert not torch.equal(step.weights["a"], START["a"])
    zero = torch.zeros(2)
    assert FrankWolfe(score="cosine").of(zero, zero, zero) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"score": "cos"}, "score = 'cos'; expected one of cosine, inner, inner_delta"),
        ({"granularity": "model"}, "granularity = 'model'; expected one of task, layer"),
        ({"step_size": 0}, "step_size = 0; expected a number above 0"),
        ({"iterations": 0}, "iterations = 0; expected at least 1"),
    ],
)
def test_bad_options(options: dict, text: str):
    with pytest.raises(WeightsmithError, match=text):
        FrankWolfe(**options)
    with pytest.raises(WeightsmithError, match="the pool is empty"):
        next(FrankWolfe().run(START, {}, towards(START)))
