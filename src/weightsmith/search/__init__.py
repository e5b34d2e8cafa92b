"""Search for recipes: what is found by evaluating, or by following a gradient through a pool.

A search is Space x Score x Sampler.  What comes out is a recipe, or a front of recipes, and a history that the same
command goes on from.

The module itself may be called: `weightsmith.search(...)` is `weightsmith.search.api.search(...)`.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Search(types.ModuleType):
    """A module and a function under one name: the folder of a feature, and its verb."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        from weightsmith.search.api import search

        return search(*given, **named)


sys.modules[__name__].__class__ = _Search
