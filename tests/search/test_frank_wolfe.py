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
UPHILL = {n: torch.ones(3, 2) for n in START}
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


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_the_initial_vertex_stands_still(granularity: str):
    """Where every checkpoint lies uphill, nothing moves."""
    away = {name: {n: START[n] + (j + 1) * noise(3, 2, seed=j).abs() for n in START} for j, name in enumerate("xy")}
    steps = list(FrankWolfe(granularity, iterations=3).run(START, readers(away), lambda w: UPHILL))
    assert len(steps) == 3
    for step in steps:
        assert set(step.chosen.values()) == {INITIAL}
        assert step.gap == 0
        assert all(torch.equal(step.weights[n], START[n]) for n in START)


def test_a_convex_loss_falls_as_the_theory_says():
    """L(w_t) - L* <= 2 C / (t + 2) for steps of 2 / (t + 2), with C = diameter^2 for this loss (Jaggi, 2013); the gap
    is never below what is still to be gained, and no iterate leaves the convex hull."""
    target = {n: sum(POOL[m][n] for m in POOL) / 3 for n in START}
    flat = {m: torch.cat([v[n].reshape(-1) for n in START]).double() for m, v in {**POOL, INITIAL: START}.items()}
    widest = max(float((a - b).square().sum()) for a in flat.values() for b in flat.values())
    before = loss(START, target)
    hull = torch.stack([flat[m] - flat[INITIAL] for m in POOL], 1)
    steps = list(FrankWolfe(step_size=1, scaling=1, iterations=60).run(START, readers(), towards(target)))
    for t, step in enumerate(steps):
        assert step.gap >= before - 1e-6  # L* = 0: the target lies in the hull
        before = loss(step.weights, target)
        assert before <= 2 * widest / (t + 3) + 1e-6
        here = torch.cat([step.weights[n].reshape(-1) for n in START]).double() - flat[INITIAL]
        shares = torch.linalg.lstsq(hull, here[:, None]).solution
        assert torch.allclose((hull @ shares)[:, 0], here, atol=1e-5)
        assert shares.min() >= -1e-5
        assert shares.sum() <= 1 + 1e-5


@pytest.mark.parametrize("score", ["inner", "inner_delta"])
def test_an_irrelevant_vertex_is_never_chosen(score: str):
    """Random weights that the gradient likes less than some checkpoint, at every iterate and for every tensor."""
    target = POOL["e0"]
    for granularity in ("task", "layer"):
        options = FrankWolfe(granularity, score, step_size=1.0, iterations=5)
        plain = list(options.run(START, readers(), towards(target)))
        slopes = [towards(target)(w) for w in (START, *(step.weights for step in plain[:-1]))]
        far = {}
        for i in range(16):
            drawn = {n: 3 * noise(3, 2, seed=500 + 2 * i + j) for j, n in enumerate(START)}
            inner = [{m: (g[n] * v[n]).sum() for m, v in {**POOL, "x": drawn}.items()} for g in slopes for n in g]
            if all(min(of, key=of.__getitem__) != "x" for of in inner):
                far[f"x{i}"] = drawn
        assert len(far) >= 3
        more = list(options.run(START, readers({**far, **POOL}), towards(target)))
        assert [s.chosen for s in plain] == [s.chosen for s in more]
        assert all(torch.equal(plain[-1].weights[n], more[-1].weights[n]) for n in START)


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
