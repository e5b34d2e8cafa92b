"""Weight matching: planted permutations come back, the objective never falls, and nothing moves for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from goldens.adapters import cases
from goldens.alignment import chain, chain_models
from kit import noise
from weightsmith.align.match import Matched, coupled, match, objective, profits, walk
from weightsmith.core.errors import NumericError
from weightsmith.core.symmetry import Axis, SymmetryGroup, composed, identity, permute

KV, PER, WIDTH, RES = 3, 2, 4, 10  # key-value heads, query heads of each, entries of a head, residual stream
HEADS = SymmetryGroup(
    "attention",
    "kv",
    KV,
    (Axis("q", 0, 0, 1, PER * WIDTH), Axis("k", 0, inner=WIDTH), Axis("v", 0, inner=WIDTH), Axis("o", 1, 0, 1, 8)),
    (
        SymmetryGroup("queries", "queries", PER, (Axis("0", 0, inner=WIDTH), Axis("3", 1, inner=WIDTH))),
        SymmetryGroup("values", "values", WIDTH, (Axis("2", 0), Axis("3", 1, outer=PER))),
    ),
)  # fmt: skip
EXPERTS = SymmetryGroup(
    "experts",
    "experts",
    3,
    (Axis("router", 0), Axis("up", 0), Axis("down", 0)),
    (SymmetryGroup("hidden", "hidden", 5, (Axis("1", 1, outer=2), Axis("2", 2))),),
)
MLP = SymmetryGroup("mlp", "mlp", 7, (Axis("fc1", 0), Axis("bias", 0), Axis("fc2", 1)))
SHAPES = {
    "q": (KV * PER * WIDTH, RES), "k": (KV * WIDTH, RES), "v": (KV * WIDTH, RES), "o": (RES, KV * PER * WIDTH),
    "router": (3, RES), "up": (3, 10, RES), "down": (3, RES, 5), "fc1": (7, RES), "bias": (7,), "fc2": (RES, 7),
}  # fmt: skip
STREAM = SymmetryGroup(
    "residual",
    "residual",
    RES,
    tuple(Axis(n, {"o": 0, "up": 2, "down": 1, "fc2": 0}.get(n, 1)) for n in SHAPES if n != "bias"),
)
GROUPS = [HEADS, EXPERTS, MLP, STREAM]


def model(seed: int) -> dict[str, Tensor]:
    return {name: noise(*shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


def drawn(groups: list[SymmetryGroup], seed: int = 0) -> dict[str, Any]:
    """Random orders."""
    draw = np.random.default_rng(seed)
    return {name: draw.permuted(order, axis=-1) for g in groups for name, order in identity(g).items()}


def applied(state: dict[str, Tensor], groups: list[SymmetryGroup], orders: Any) -> dict[str, Tensor]:
    for group in groups:
        state = {**state, **permute(state, group, orders)}
    return state


@pytest.mark.parametrize("groups", [[HEADS], [EXPERTS], [MLP], [STREAM], GROUPS], ids=lambda g: g[0].name + str(len(g)))
def test_a_planted_permutation_is_undone_exactly(groups: list[SymmetryGroup]) -> None:
    a = model(0)
    orders = drawn(groups)
    b = applied(a, groups, orders)
    assert not any(torch.equal(a[n], b[n]) for g in groups for n in g.names)
    found = match(groups, a, b)
    back = applied(b, groups, found.orders)
    assert all(torch.equal(a[n], back[n]) for n in a)
    assert not found.aligned
    for group in groups:
        both = composed(group, orders, found.orders)
        assert all(np.array_equal(both[n], order) for n, order in identity(group).items())


def test_orders_compose() -> None:
    a, first, then = model(0), drawn(GROUPS, 1), drawn(GROUPS, 2)
    twice = applied(applied(a, GROUPS, first), GROUPS, then)
    once = applied(a, GROUPS, {n: o for g in GROUPS for n, o in composed(g, first, then).items()})
    assert all(torch.equal(twice[n], once[n]) for n in a)


def test_the_objective_never_falls_and_is_what_it_says() -> None:
    a, b = model(0), model(100)
    reached = set()
    for first in range(len(GROUPS)):
        found = match([*GROUPS[first:], *GROUPS[:first]], a, b)
        assert all(later > earlier for earlier, later in zip(found.steps, found.steps[1:], strict=False))
        assert found.before == pytest.approx(objective(a, b)) == pytest.approx(found.steps[0])
        assert found.after == pytest.approx(objective(a, applied(b, GROUPS, found.orders)))
        reached.add(round(found.after, 6))
        again = match(GROUPS, a, b, start=found.orders)
        assert again.after == pytest.approx(found.after)
    best = match(GROUPS, a, b, restarts=5)
    assert len(reached) > 1  # local optima: more starts pay
    assert best.after >= match(GROUPS, a, b).after


def test_models_that_lie_well_stay_as_they_are() -> None:
    a = model(0)
    b = {name: t + 0.01 * noise(*t.shape, seed=9) for name, t in a.items()}
    for other in (a, b):
        assert match(GROUPS, a, other).aligned
    zero = {name: torch.zeros_like(t) for name, t in a.items()}
    assert match(GROUPS, a, zero).aligned  # all profits equal: nothing moves for nothing
    same = {
        **a,
        "fc1": a["fc1"][:1].expand(7, -1),
        "bias": a["bias"][:1].expand(7),
        "fc2": a["fc2"][:, :1].expand(-1, 7),
    }
    assert match([MLP], same, same).aligned


def test_one_layer_takes_one_step() -> None:
    assert len(match([MLP], model(0), model(100)).steps) == 2


def test_a_tensor_with_a_group_on_both_axes() -> None:
    square = SymmetryGroup("s", "residual", 6, (Axis("w", 0), Axis("w", 1), Axis("b", 0)))
    assert coupled(square)
    a = {"w": noise(6, 6), "b": noise(6, seed=3)}
    found = match([square], a, permute(a, square, drawn([square])["s"]))
    assert found.after >= found.before
    assert list(found.steps) == sorted(found.steps)


def test_what_does_not_count_still_moves() -> None:
    norm = SymmetryGroup("c", "channels", 7, (*MLP.axes, Axis("bn.running_mean", 0)))
    a, b = ({**model(s), "bn.running_mean": 1e6 * noise(7, seed=s)} for s in (0, 100))
    assert np.array_equal(match([norm], a, b).orders["c"], match([MLP], a, b).orders["mlp"])
    assert not np.array_equal(match([norm], a, b, skip=()).orders["c"], match([MLP], a, b).orders["mlp"])
    placed = permute(b, norm, match([norm], a, b).orders)
    assert not torch.equal(placed["bn.running_mean"], b["bn.running_mean"])


def test_normalized_terms_forget_the_scale_of_a_tensor() -> None:
    a, b = model(0), model(100)
    loud = {**b, "fc2": 1e4 * b["fc2"]}
    plain, scaled = (match([MLP], a, x, normalize=True).orders["mlp"] for x in (b, loud))
    assert np.array_equal(plain, scaled)
    assert not np.array_equal(match([MLP], a, loud).orders["mlp"], plain)


def test_groups_without_a_common_tensor_are_matched_apart() -> None:
    assert [[g.name for g in one] for one in walk([HEADS, EXPERTS, MLP])] == [["attention"], ["experts"], ["mlp"]]
    assert [len(one) for one in walk(GROUPS)] == [4]


def test_the_method_undoes_permutations_of_fused_matrices() -> None:
    """gate and up in one tensor, one behind the other: both halves move alike."""
    from weightsmith import merge

    name = "model.layers.0.mlp.{}_proj.weight"
    base = {name.format("gate_up"): noise(14, 5), name.format("down"): noise(5, 7, seed=1)}
    order = np.random.default_rng(0).permutation(7)
    moved = {
        name.format("gate_up"): base[name.format("gate_up")]
        .reshape(2, 7, 5)[:, torch.from_numpy(order)]
        .reshape(14, 5),
        name.format("down"): base[name.format("down")][:, torch.from_numpy(order)],
    }
    back = merge({"moved": moved}, "weight_matching", base=base)
    assert all(torch.equal(back[n], base[n]) for n in base)


def test_numbers_that_are_none_are_named() -> None:
    broken = model(0)
    broken["fc2"][1, 2] = torch.nan
    with pytest.raises(NumericError, match="fc2 of the moving model holds NaN or Inf"):
        match([MLP], model(1), broken)


@pytest.mark.parametrize("case", [c for c in cases() if c.method == "pleas"], ids=lambda c: c.path.stem)
def test_what_golden_cases_are_given_is_found_again(case: Any) -> None:
    first, second = chain_models(case)
    layers, given = chain(first), case.expected
    orders = {g.name: given[f"perm.{g.name}"].numpy() for g in layers}
    found: Matched = match(layers, first, second, start=orders)
    assert all(np.array_equal(found.orders[n], order) for n, order in orders.items())  # no assignment is better
    for group in layers:
        profit = torch.from_numpy(profits(group, first, second, orders, layers)).float()
        assert torch.allclose(profit, given[f"profit.{group.name}"], rtol=1e-5, atol=1e-5)
