"""The suites that `weightsmith bench --suite` knows: one file each, found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.study.suite import Suite

__all__ = ["suite", "suites"]


@cache
def suites() -> Mapping[str, Suite]:
    """Name -> suite, for every file of this folder that defines SUITE."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Suite] = [importlib.import_module(f"{__name__}.{file}").SUITE for file in files]
    return {one.name: one for one in found}


def suite(name: str) -> Suite:
    """The suite of that name; RecipeError with the nearest where there is none."""
    known = suites()
    if name not in known:
        raise RecipeError(f"unknown suite {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return known[name]
