"""Matching by activations, and more models than two (Git Re-Basin, arXiv:2209.04836)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.align.match import match
from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import Orders, SymmetryGroup, composed, identity, permute
from weightsmith.ops.assign import assigned

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["match_activations", "merge_many"]


def match_activations(
    groups: Sequence[SymmetryGroup],
    reference: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    *,
    by: str = "product",
) -> dict[str, np.ndarray]:
    """One assignment for each group, from what its units do on the same inputs; no iteration.

    reference, moving  group name -> [tokens, units] of a model, in its own order of units
    by                 'product' (profits X_A^T X_B) or 'distance' (minus the Euclidean distance of two units)
    For groups without groups inside.  Raises RecipeError for shapes that do not fit, NumericError for NaN and Inf.
    """
    if by not in ("product", "distance"):
        raise RecipeError(f"by = {by!r} is neither product nor distance")
    orders = {}
    for group in groups:
        a, b = (state[group.name].double() for state in (reference, moving))
        if group.inside or a.shape != b.shape or a.ndim != 2 or a.shape[1] != group.size:
            raise RecipeError(
                f"{group.name}: activations are [tokens, {group.size}] of both models, not {list(a.shape)} and "
                f"{list(b.shape)}, and its units hold no groups of their own"
            )
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NumericError(f"activations of {group.name} hold NaN or Inf")
        profit = a.T @ b if by == "product" else -torch.cdist(a.T, b.T)
        orders[group.name] = assigned(profit.numpy())
    return orders


def merge_many(
    groups: Sequence[SymmetryGroup],
    models: Sequence[Mapping[str, Tensor]],
    *,
    still: Sequence[int] = (),
    seed: int = 0,
    max_iter: int = 100,
    **how: Any,
) -> tuple[dict[str, Tensor], list[Orders]]:
    """MergeMany (algorithm 3): match each model onto the mean of the others, in random order, until nothing moves.

    models  tensor name -> tensor, all of the same names and shapes
    still   numbers of models whose units stay where they are; the others are matched onto these alone at first,
            as a mean of models that lie anyhow is no model yet
    how     see `match.match`
    Returns the mean, and what became of each model's units.  It ends: no step makes the models less alike, and
    permutations are finitely many.
    """
    if len(models) < 2:
        raise RecipeError(f"{len(models)} models: there is nothing to match")
    states = [dict(model) for model in models]
    orders: list[Orders] = [{n: o for group in groups for n, o in identity(group).items()} for _ in states]
    draw = np.random.default_rng(seed)
    for turn in range(max_iter):
        moved = first = bool(turn == 0 and still)
        for i in draw.permutation([i for i in range(len(states)) if i not in still]):
            near = [state for k, state in enumerate(states) if (k in still if first else k != i)]
            others = {n: _mean([state[n] for state in near]) for n in states[i]}
            found = match(groups, others, states[i], seed=seed, **how)
            if found.aligned:
                continue
            moved = True
            for group in groups:
                states[i] |= permute(states[i], group, found.orders)
                orders[i] = {**orders[i], **composed(group, orders[i], found.orders)}
        if not moved:
            break
    return {n: _mean([s[n] for s in states]) for n in states[0]}, orders


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.stack([t.double() for t in tensors]).mean(0)
    return total.to(tensors[0].dtype) if tensors[0].is_floating_point() else tensors[0]
