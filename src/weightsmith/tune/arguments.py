"""What may be given to `weightsmith.tune`, and one line for what may not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from weightsmith.core.errors import RecipeError
from weightsmith.core.settings import Settings
from weightsmith.io.read.small import short
from weightsmith.recipe.schema import Recipe
from weightsmith.tune.descent import Descent
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["refuse_others"]

_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "recipe": ((Recipe, Mapping, str, Path), "a recipe, its tree, or its path"),
    "space": ((str, Preset, Setting, Mapping), "a preset by name or value, or parameter -> Free"),
    "data": ((Mapping,), "task -> batches, as {'math': [batch, batch]}"),
    "validation": ((Mapping,), "task -> batches, as {'math': [batch, batch]}"),
    "module": ((nn.Module,), "a torch module, the base model"),
    "descent": ((Descent,), "a Descent"),
    "models": ((Mapping,), "name -> model"),
    "out": ((str, Path), "a folder"),
    "settings": ((Settings,), "Settings"),
    "every": ((int,), "a whole number of steps"),
}
"""Argument -> what may be given, besides None, and what that is in words."""


def refuse_others(given: Mapping[str, Any]) -> None:
    """Raise RecipeError for an argument of `tune` that cannot be one."""
    for name, (kinds, wanted) in _KINDS.items():
        if given[name] is not None and not isinstance(given[name], kinds):
            raise RecipeError(f"{name} should be {wanted}, is {short(given[name])}")
    if given["every"] < 1:
        raise RecipeError(f"every = {given['every']} is outside [1, inf)")
    for name in ("data", "validation"):
        for task, batches in (given[name] or {}).items():
            if not hasattr(batches, "__len__") or not hasattr(batches, "__getitem__"):
                raise RecipeError(f"{name} of {task} should be a sequence of batches, is {short(batches)}")
    functions = given["function"]
    for task, one in functions.items() if isinstance(functions, Mapping) else (("", functions),):
        if one is not None and not callable(one):
            raise RecipeError(f"function{f' of {task}' if task else ''} should be callable, is {short(one)}")
    if isinstance(given["space"], Mapping):
        for name, free in given["space"].items():
            if not isinstance(free, Free):
                raise RecipeError(f"space: {name} should be a Free, as Free(per='layer'), is {short(free)}")
