"""`weightsmith methods`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weightsmith.cli.options import Json, Plugins
from weightsmith.cli.show import roughly, say, show_json, table

if TYPE_CHECKING:
    from weightsmith.core.method import Stage

__all__ = ["cost_at_7b", "describe", "methods"]


def methods(
    name: Annotated[str | None, Parameter(help="Method to explain; default: list all.")] = None,
    /,
    *,
    json: Json = False,
    plugin: Plugins = (),
) -> None:
    """List the methods, or explain one: what it does, its paper, what it needs, its parameters."""
    from weightsmith.core.method import registered, registry
    from weightsmith.plugins import load_file

    for file in plugin:
        load_file(file)
    if name is not None:
        found = describe(registry(name))
        if json:
            show_json(found)
        else:
            _explain(found)
        return
    every = [describe(cls) for cls in registered().values()]
    if json:
        show_json(every)
        return
    rows = [(m["name"], m["kind"], m["summary"], m["paper"]) for m in every]
    table("Methods", ("name", "kind", "what it does", "paper"), rows)
    say('"weightsmith methods NAME" explains one and lists its parameters.')


def describe(cls: type[Stage]) -> dict[str, Any]:
    """Everything a stage declares about itself, as plain values."""
    from weightsmith.core.method import Codec, Filter
    from weightsmith.plan.cost import seconds_at_7b

    traits = cls.traits
    text = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": traits.name,
        "aliases": list(traits.aliases),
        "kind": "filter" if issubclass(cls, Filter) else "codec" if issubclass(cls, Codec) else "method",
        "summary": text.split("\n")[0],
        "text": text,
        "paper": traits.paper,
        "needs": list(traits.needs),
        "grain": traits.grain.value,
        "symmetric": traits.symmetric,
        "min_models": traits.min_count,
        "max_models": traits.max_count,
        "otherwise": traits.otherwise,
        "seconds_per_billion": traits.cost,
        "seconds_at_7b": seconds_at_7b(cls),
        "parameters": [
            {"name": p.name, "default": p.default, "range": p.range, "per_model": p.each, "meaning": p.help}
            for p in cls.parameters()
        ],
    }


def cost_at_7b(found: Mapping[str, Any]) -> str:
    """What a method costs on models of 7e9 parameters, in words."""
    return f"{roughly(found['seconds_at_7b'])} per model, on one core of the reference machine (default parameters)"


_GRAINS = {
    "element": "any block of rows (models of any size in bounded memory)",
    "tensor": "one whole tensor at a time",
    "group": "several whole tensors that belong together",
}


def _explain(found: dict[str, Any]) -> None:
    also = f", also called {', '.join(found['aliases'])}" if found["aliases"] else ""
    say(f"{found['name']} ({found['kind']}{also})")
    say()
    say(found["text"])
    say()
    needs = ["a base model" if n == "base" else f"the statistic {n!r} (weightsmith observe)" for n in found["needs"]]
    top = found["max_models"]
    models = (
        f"{found['min_models']}" if top == found["min_models"] else f"{found['min_models']} to {top or 'any number'}"
    )
    facts = [
        ("paper", found["paper"] or "-"),
        ("needs", ", ".join(needs) or "nothing but the models"),
        ("models", models),
        ("sees", _GRAINS[found["grain"]]),
        ("order", "of the models does not matter" if found["symmetric"] else "of the models may matter"),
    ]
    if found["seconds_at_7b"] is not None:
        facts.append(("at 7B", f"about {cost_at_7b(found)}"))
    if found["otherwise"]:
        facts.append(("elsewhere", f"tensors it does not cover are merged by {found['otherwise']}"))
    for name, text in facts:
        say(f"{name + ':':<11}{text}")
    say()
    rows = [
        (p["name"], p["default"], p["range"], "yes" if p["per_model"] else "", p["meaning"])
        for p in found["parameters"]
    ]
    if rows:
        table("Parameters", ("name", "default", "range", "per model", "meaning"), rows)
    else:
        say("No parameters.")
