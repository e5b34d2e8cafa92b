"""What methods there are, and when to use one: as `weightsmith methods` tells it."""

from __future__ import annotations

from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.method import registry
from weightsmith.inspect.catalogue import describe, facts
from weightsmith.recipe.aliases import PIPELINES
from weightsmith.studio.asked import Asked, Studio, html
from weightsmith.studio.form import method_groups, summaries

__all__ = ["every", "one"]


def every(studio: Studio, asked: Asked) -> Any:
    told = summaries()
    groups = [(purpose, [(name, told[name]) for name in names]) for purpose, names in method_groups()]
    return html("methods.html", title="Methods", page="recipe", groups=groups)


def one(studio: Studio, asked: Asked) -> Any:
    name = asked.path["name"]
    if name not in summaries():
        registry(name)  # says what is near
        raise RecipeError(f"unknown method {name!r}")
    names = [stage for stage, _ in PIPELINES[name]] if name in PIPELINES else [name]
    stages = []
    for inner in names:
        found = describe(registry(inner))
        told = facts(found)
        stages.append({**found, "facts": told, "needs_words": dict(told)["needs"]})
    return html("method.html", title=name, page="recipe", name=name, summary=summaries()[name], stages=stages)
