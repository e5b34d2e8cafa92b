"""Inspecting tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.inputs.opened import Inputs
from weightsmith.inspect.run import Inspection, inspect
from weightsmith.io.read.source import MemorySource
from weightsmith.recipe.schema import Recipe

WORD = "w"


def of(base: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], **options: Any) -> Inspection:
    """The inspection of experts base + delta, called 'a', 'b', ..."""
    names = [chr(ord("a") + i) for i in range(len(deltas))]
    experts = {n: MemorySource({k: base[k] + d for k, d in one.items()}) for n, one in zip(names, deltas, strict=True)}
    recipe = Recipe(models=dict.fromkeys(names, "in memory"), method="linear")
    return inspect(recipe, sources=Inputs(MemorySource(base), experts), **{"threads": 1, **options})


def of_vectors(base: Sequence[float], *deltas: Sequence[float]) -> Inspection:
    """One tensor called 'w'."""
    return of({WORD: torch.tensor(base)}, [{WORD: torch.tensor(delta)} for delta in deltas])
