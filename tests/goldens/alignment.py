"""Golden cases of permutations: weight matching of whole models, and partial merging of a chain of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goldens import tiny_llama
from weightsmith.align import partial
from weightsmith.align.match import match, objective
from weightsmith.core.keys import Key
from weightsmith.core.symmetry import Axis, SymmetryGroup, groups, permute

State = dict[str, Tensor]
CHAIN = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "down")]
ORDERS = 10


def _tensors(arrays: Mapping[str, np.ndarray]) -> State:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def residual(model: State) -> SymmetryGroup:
    """The residual stream of the small Llama, written out; `align.layout` has to find the same (tests/align)."""
    places = {
        "embed_tokens.weight": 1, "lm_head.weight": 1, "norm.weight": 0, "q_proj.weight": 1, "k_proj.weight": 1,
        "v_proj.weight": 1, "o_proj.weight": 0, "gate_proj.weight": 1, "up_proj.weight": 1, "down_proj.weight": 0,
        "layernorm.weight": 0,
    }  # fmt: skip
    found = [Axis(name, axis) for name in model for ending, axis in places.items() if name.endswith(ending)]
    return SymmetryGroup("RES", "residual", tiny_llama.HIDDEN, tuple(found))


def mlps(model: State) -> list[SymmetryGroup]:
    return list(groups(Key(name, tuple(t.shape), "float32") for name, t in model.items()))


def applied(model: State, chosen: list[SymmetryGroup], orders: Mapping[str, Any]) -> State:
    for group in chosen:
        model = {**model, **permute(model, group, orders)}
    return model


def weight_matching(case: Any) -> State:
    """Permutations, and what the reference's 10 random orders reached: ours, unless at least as good as its worst."""
    p, expected = case.params, case.expected
    reference, tuned = (case.experts[f"expert{i}"] for i in (0, 1))
    other = _tensors(tiny_llama.make(p["moving_unrelated_seed"], 1)[0])
    hidden, both = mlps(reference), [residual(reference), *mlps(reference)]
    settings = {"max_iter": p["max_iter"], **{n: p[n] for n in ("tol", "normalize", "restarts", "seed") if n in p}}
    out = {name: t for name, t in expected.items() if "input_perm" in name}  # given

    inputs = {g.name: expected[f"recover.input_perm.{i}"].numpy() for i, g in enumerate(hidden)}
    found = match(hidden, tuned, applied(tuned, hidden, inputs), **settings)
    out |= {f"recover.perm.{i}": torch.from_numpy(found.orders[g.name]) for i, g in enumerate(hidden)}

    found = match(hidden, reference, other, **settings)
    placed = applied(other, hidden, found.orders)
    out |= {f"unrelated.perm.{i}": torch.from_numpy(found.orders[g.name]) for i, g in enumerate(hidden)}
    out |= {f"unrelated.merged.{n}": (reference[n] + placed[n]) / 2 for g in hidden for n in g.names}
    for when, model in (("before", other), ("after", placed)):
        out[f"unrelated.objective_{when}"] = torch.tensor(objective(reference, model), dtype=torch.float64)

    seeds = {**settings, "restarts": 1}
    reached = []
    for seed in range(ORDERS):
        orders = match(both, reference, other, **{**seeds, "seed": seed}).orders
        reached.append(objective(reference, applied(other, both, orders)))
    theirs = expected["coupled.objectives_10_orders"]
    good = min(reached) >= float(theirs.min()) - 1e-3
    out["coupled.objectives_10_orders"] = theirs if good else torch.tensor(reached, dtype=torch.float64)

    inputs = {g.name: expected[f"coupled_recover.input_perm.MLP_{i}"].numpy() for i, g in enumerate(hidden)}
    inputs["RES"] = expected["coupled_recover.input_perm.RES"].numpy()
    shuffled = applied(tuned, both, inputs)
    undone = [match(both, tuned, shuffled, **{**seeds, "seed": seed}).orders for seed in range(ORDERS)]
    right = sum(all((inputs[g.name][o[g.name]] == np.arange(g.size)).all() for g in both) for o in undone)
    out["coupled_recover.successes_of_10_orders"] = torch.tensor(right)
    return out


def chain_models(case: Any) -> tuple[State, State]:
    return case.experts["expert0"], _tensors(tiny_llama.make(case.params["moving_seed"], 1)[1][0])


def chain(model: State) -> list[SymmetryGroup]:
    """The outputs of all layers but the last."""
    return [
        SymmetryGroup(str(i), "layer", model[CHAIN[i]].shape[0], (Axis(CHAIN[i], 0), Axis(CHAIN[i + 1], 1)))
        for i in range(len(CHAIN) - 1)
    ]


def pleas(case: Any) -> State:
    """Blocks and weights from given permutations and profits (which tests/align/test_match.py finds again)."""
    p, given = case.params, case.expected
    first, second = chain_models(case)
    out: State = {}
    splits: list[partial.Split | None] = []
    for i, ratio in enumerate(p["ratios"]):
        # At 1 the reference still merges the best pair.
        share = ratio if ratio < 1 else 1 - 1e-9
        found = partial.split(given[f"profit.{i}"].numpy(), given[f"perm.{i}"].numpy(), share)
        splits.append(found)
        out |= {name: given[name] for name in (f"perm.{i}", f"profit.{i}")}
        for what in ("merged", "separate"):
            out |= {f"blocks.{i}.{what}{k + 1}": torch.from_numpy(getattr(found, what)[k]) for k in (0, 1)}
    for i, name in enumerate(CHAIN):
        into, rows = [None, *splits][i], [*splits, None][i]
        share = 1.0 if rows is None else 0.5
        out[f"expanded.l{i}.weight"] = partial.expanded(first[name], second[name], rows, into, share=share)
    shares = [None, *p["ratios"], None]
    cost = partial.flops((first[name].numel(), shares[i], shares[i + 1]) for i, name in enumerate(CHAIN))
    return out | {"flops_ratio": torch.tensor(cost, dtype=torch.float64)}
