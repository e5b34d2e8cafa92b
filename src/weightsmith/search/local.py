"""Frank-Wolfe with a local merge that drops entries: TIES or DARE of the way from the current weights to a vertex.

No coefficients of the pool make up such an iterate, so each is a recipe on the one before it: base: the iterate before,
models: the pool and the start, method: ties or dare, weights: 1 for the chosen and 0 for the others, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.search.frank_wolfe import INITIAL
from weightsmith.search.pool import Options, Stride, Walk

__all__ = ["LONGEST", "Steps", "iterate"]

LONGEST = 12
"""Iterations: a recipe holds those of all iterates before it, and files are read to a limited depth."""


def iterate(tree: Mapping[str, Any], number: int, options: Options, table: Callable[[int], Path]) -> dict[str, Any]:
    """The recipe of an iterate, as a tree.

    tree   base and models of the pool; table: number -> the file with the weights of that iterate's models
    """
    if number == 0:
        first = options.scaling if options.start == "all" else 0.0
        return {**tree, "method": [{"name": "task_arithmetic"}], "parameters": {"lambda": 1.0, "weight": first}}
    # Trimming over the whole model takes whole models; where tensors have vertices of their own it is by tensor.
    scope = "global" if options.granularity == "task" else "tensor"
    keep = options.density
    stages: Any = {
        "ties": [{"name": "ties", "parameters": {"density": keep, "scope": scope}}],
        "dare": [{"name": "dare", "parameters": {"density": keep}}, {"name": "task_arithmetic"}],
    }[options.local]
    around = around_which(tree, number - 1, options, table)
    values = {"lambda": options.size(number - 1), "weight": {"file": str(table(number))}}
    return {**around, "method": stages, "parameters": values, "seed": int(tree.get("seed", 0)) + number}


def around_which(tree: Mapping[str, Any], number: int, options: Options, table: Any) -> dict[str, Any]:
    """Base and models of the step that leaves an iterate: that iterate, the pool, the start where it is not that."""
    if number == 0 and options.start == "base":
        return dict(tree)
    plain = {"output": {**tree.get("output", {}), "dtype": "float32"}}
    here = {**iterate(tree, number, options, table), **plain}
    start = {INITIAL: _model(tree, options, table, plain)} if number else {}
    return {**tree, "base": {"model": here}, "models": {**tree["models"], **start}}


def _model(tree: Mapping[str, Any], options: Options, table: Any, plain: Mapping[str, Any]) -> Any:
    return tree["base"] if options.start == "base" else {"model": {**iterate(tree, 0, options, table), **plain}}


class Steps:
    """Takes the steps: as `Walk`, with the recipes of its iterates in place of coefficients."""

    def __init__(
        self, tree: Mapping[str, Any], options: Options, table: Callable[[int], Path], walk: Callable[[Any], Walk]
    ) -> None:
        """table: number -> the file with the weights of that iterate's models; walk: tree -> a walk from its base."""
        self.tree, self.options, self._table, self._walk = tree, options, table, walk
        self.models: tuple[str, ...] = ()
        self._weights: dict[str, Tensor] = {}

    def step(self, t: int) -> Stride:
        """Take iteration t, counted from 0, from the recipe of iterate t."""
        around = around_which(self.tree, t, self.options, self._table)
        walk = self._walk(around)
        look = walk.look()
        self.models = tuple(walk.models)
        weights = torch.zeros_like(walk.coefficients)
        for chosen in look.rounds:
            for row, vertex in enumerate(chosen):
                if vertex is not None and vertex < len(walk.models):
                    weights[row, vertex] = 1.0
        self._weights = dict(zip(walk.names, weights.unbind(), strict=True))
        return Stride(walk.called(look), look.gap, self.options.size(t), look.loss)

    def table(self) -> dict[str, Tensor]:
        """Tensor -> weights [models] of the last step."""
        return self._weights
