"""Learned coefficients: any number of any recipe, from a handful of inputs, at the memory of one model.

A tuning is Space x Objective x Descent (`setting`), all of them frozen values.  What comes out is a recipe and a file
of coefficients, never a model.

The module itself may be called: `weightsmith.tune(...)` is `weightsmith.tune.api.tune(...)`.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Tune(types.ModuleType):
    """A module and a function under one name: the folder of a feature, and its verb."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        from weightsmith.tune.api import tune

        return tune(*given, **named)


sys.modules[__name__].__class__ = _Tune
