"""Permutations learned from labelled batches with a straight-through estimator (Git Re-Basin, arXiv:2209.04836)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.align.match import match
from weightsmith.core.errors import RecipeError
from weightsmith.core.symmetry import Orders, SymmetryGroup, indices, moved

__all__ = ["Learned", "straight_through"]


@dataclass(frozen=True)
class Learned:
    """The orders with the lowest loss seen, that loss, and the loss of every batch, at the midpoint."""

    orders: Orders
    loss: float
    losses: tuple[float, ...]


def straight_through(
    module: nn.Module,
    groups: Sequence[SymmetryGroup],
    reference: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Callable[[Callable[..., Tensor], Any], Tensor],
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
) -> Learned:
    """Find the order of `moving` whose midpoint with `reference` has the lowest loss on some batch.

    A shadow of the reference starts where it is.  For each batch the moving model is matched onto the shadow, from the
    last orders on; the loss is that of the mean of the reference and the permuted model, and its gradient goes to the
    shadow as if that were the mean (SGD with momentum).

    module   runs the networks; its own weights are not used
    batches  whatever `loss` takes; for several epochs give them several times
    loss     (run, batch) -> scalar; run(*inputs) gives the outputs of the midpoint
    Raises RecipeError where there is no batch.
    """
    shadow = {n: t.detach().clone() for n, t in reference.items()}
    speed = {n: torch.zeros_like(t) for n, t in shadow.items() if t.is_floating_point()}
    shapes = {n: t.shape for n, t in moving.items()}
    orders: Orders = {}
    best: tuple[float, Orders] | None = None
    losses: list[float] = []
    for batch in batches:
        orders = match(groups, shadow, moving, start=orders).orders
        places = indices(groups, orders, shapes)
        middle = {n: (reference[n] + moved(t, places.get(n, {}))) / 2 if n in speed else t for n, t in moving.items()}
        leaves = {n: t.detach().requires_grad_() if n in speed else t for n, t in middle.items()}
        value = loss(lambda *inputs, leaves=leaves: functional_call(module, leaves, inputs), batch)
        losses.append(float(value.detach()))
        if best is None or losses[-1] < best[0]:
            best = losses[-1], orders
        names = list(speed)
        grads = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                speed[name] = momentum * speed[name] + grad
                shadow[name] = shadow[name] - lr * speed[name]
    if best is None:
        raise RecipeError("no batch to learn a permutation from")
    return Learned(best[1], best[0], tuple(losses))
