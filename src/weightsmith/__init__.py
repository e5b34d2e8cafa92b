"""weightsmith: make better models of trained ones by working on their weights.

    import weightsmith as ws

    merged = ws.merge({"math": "models/math", "code": "models/code"}, ws.Dare(density=0.5) | ws.Ties(), "models/base")
    ws.Recipe.load("recipe.yaml").run("merged")

Every method is an attribute under its class name (`ws.Ties`, `ws.TaskArithmetic`); `dir(ws)` lists them.
Nothing is imported before it is asked for: `import weightsmith` costs no torch.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.core.errors import (
        MissingExtra,
        NumericError,
        OutputError,
        PlanError,
        RecipeError,
        SourceError,
        WeightsmithError,
    )
    from weightsmith.core.method import Filter, Method, Pipeline, registered
    from weightsmith.core.settings import Settings
    from weightsmith.io.read.open import open_source
    from weightsmith.jobs.api import merge
    from weightsmith.jobs.recipe import Recipe
    from weightsmith.jobs.soup import greedy_soup
    from weightsmith.search.api import search
    from weightsmith.tune.api import tune

__version__ = "0.1.0"

__all__ = [
    "Filter",
    "Method",
    "MissingExtra",
    "NumericError",
    "OutputError",
    "Pipeline",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Settings",
    "SourceError",
    "WeightsmithError",
    "greedy_soup",
    "merge",
    "open_source",
    "registered",
    "search",
    "tune",
]

_HOMES = {
    "Filter": "core.method",
    "Method": "core.method",
    "Pipeline": "core.method",
    "registered": "core.method",
    "Recipe": "jobs.recipe",
    "Settings": "core.settings",
    "merge": "jobs.api",
    "greedy_soup": "jobs.soup",
    "open_source": "io.read.open",
}


def __getattr__(name: str) -> Any:
    """Import a public name at first use; any other capitalised name is a method's class."""
    if name in ("search", "tune"):
        value = importlib.import_module(f"weightsmith.{name}")  # which may be called
    elif name in __all__:
        value = getattr(importlib.import_module(f"weightsmith.{_HOMES.get(name, 'core.errors')}"), name)
    elif name[:1].isupper():
        value = _method_class(name)
    else:
        raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from weightsmith.core.method import registered

    return sorted({*__all__, "__version__", *(cls.__name__ for cls in registered().values())})


def _method_class(name: str) -> Any:
    """The method, filter or codec whose class is called `name`."""
    from weightsmith.core.errors import RecipeError, did_you_mean
    from weightsmith.core.method import registered, registry

    try:  # the usual case imports one file: TaskArithmetic is in task_arithmetic
        found = registry(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    except RecipeError:
        found = None
    if found is not None and found.__name__ == name:
        return found
    known = {cls.__name__: cls for cls in registered().values()}
    if name in known:
        return known[name]
    raise AttributeError(f"module 'weightsmith' has no attribute {name!r}{did_you_mean(name, known)}")
