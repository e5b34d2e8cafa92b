"""Matching by activations, and several models at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kit import noise
from weightsmith.align.many import match_activations, merge_many
from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.core.symmetry import Axis, SymmetryGroup, permute

N = 9
FIRST = SymmetryGroup("first", "mlp", N, (Axis("w1", 0), Axis("b1", 0), Axis("w2", 1)))
SECOND = SymmetryGroup("second", "mlp", N, (Axis("w2", 0), Axis("w3", 1)))
GROUPS = [FIRST, SECOND]


def model(seed: int) -> dict[str, Tensor]:
    shapes = {"w1": (N, 5), "b1": (N,), "w2": (N, N), "w3": (4, N)}
    return {name: noise(*shape, seed=10 * seed + i) for i, (name, shape) in enumerate(shapes.items())}


def shuffled(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    for group in GROUPS:
        state = {**state, **permute(state, group, draw.permutation(N))}
    return state


def hidden(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    first = torch.relu(x @ state["w1"].T + state["b1"])
    return {"first": first, "second": torch.relu(first @ state["w2"].T)}


@pytest.mark.parametrize("by", ["product", "distance"])
def test_activations_undo_a_permutation(by: str) -> None:
    a = model(1)
    b, x = shuffled(a, 3), noise(200, 5, seed=9)
    orders = match_activations(GROUPS, hidden(a, x), hidden(b, x), by=by)
    for group in GROUPS:
        b = {**b, **permute(b, group, orders)}
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_activations_that_do_not_fit() -> None:
    acts = {g.name: noise(20, N) for g in GROUPS}
    with pytest.raises(RecipeError, match=r"first: activations are \[tokens, 9\] of both models, not \[20, 8\] and"):
        match_activations(GROUPS, {**acts, "first": noise(20, 8)}, acts)
    with pytest.raises(NumericError, match="activations of second hold NaN or Inf"):
        match_activations(GROUPS, acts, {**acts, "second": torch.full((20, N), torch.nan)})
    with pytest.raises(RecipeError, match="by = 'cosine' is neither product nor distance"):
        match_activations(GROUPS, acts, acts, by="cosine")


def test_copies_in_other_orders_become_one_model() -> None:
    base = model(1)
    mean, orders = merge_many(GROUPS, [shuffled(base, seed) for seed in range(4)])
    x = noise(30, 5, seed=9)
    assert torch.allclose(hidden(mean, x)["second"] @ mean["w3"].T, hidden(base, x)["second"] @ base["w3"].T, atol=1e-4)
    assert len(orders) == 4


def test_models_are_more_alike_than_before_and_the_mean_is_theirs() -> None:
    models = [model(seed) for seed in (1, 2, 3)]
    mean, orders = merge_many(GROUPS, models, seed=1)
    placed = []
    for state, order in zip(models, orders, strict=True):
        for group in GROUPS:
            state = {**state, **permute(state, group, order)}
        placed.append(state)
    for name, tensor in mean.items():
        assert torch.allclose(tensor, torch.stack([s[name] for s in placed]).mean(0), atol=1e-6)

    def spread(states: list[dict[str, Tensor]]) -> float:
        return sum(float(torch.stack([s[n] for s in states]).var(0).sum()) for n in mean)

    assert spread(placed) < spread(models)
    again, same = merge_many(GROUPS, placed, seed=2)
    assert all((o[g.name] == np.arange(N)).all() for o in same for g in GROUPS)
    assert all(torch.allclose(again[n], mean[n], atol=1e-6) for n in mean)
    _, held = merge_many(GROUPS, models, seed=1, still=(1,))
    assert any((orders[1][g.name] != np.arange(N)).any() for g in GROUPS)
    assert all((held[1][g.name] == np.arange(N)).all() for g in GROUPS)
    with pytest.raises(RecipeError, match="1 models: there is nothing to match"):
        merge_many(GROUPS, models[:1])
