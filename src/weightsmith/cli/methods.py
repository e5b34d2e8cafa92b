"""`weightsmith methods`."""

from __future__ import annotations

from typing import Annotated

from weightsmith.cli.options import Json, Plugins
from weightsmith.cli.show import say, show_json, table
from weightsmith.cli.words import Parameter
from weightsmith.inspect.catalogue import describe, describe_pipeline, describe_preset, explain, listing

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, Parameter(help="Method to explain; default: list all.")] = None,
    /,
    *,
    json: Json = False,
    plugin: Plugins = (),
) -> None:
    """List the methods by purpose, or explain one: what it does, its paper, what it needs, its parameters."""
    from weightsmith.cli.shown.tuning import preset
    from weightsmith.core.elsewhere import LEARNED
    from weightsmith.core.method import registered
    from weightsmith.plugins import load_file
    from weightsmith.recipe.aliases import PIPELINES, stage_called
    from weightsmith.tune.registry import lines

    for file in plugin:
        load_file(file)
    if name is None:
        every = [describe(cls) for cls in registered().values()]
        every += [describe_preset(learned, said) for learned, said in lines("presets").items()]
        if json:
            show_json(every)
        else:
            say(listing(every))
        return
    found = (
        preset(name)
        if name in LEARNED
        else describe_pipeline(name)
        if name in PIPELINES
        else describe(stage_called(name))
    )
    if json:
        show_json(found)
        return
    say(explain(found))
    rows = [
        (p["name"], p["default"], p["range"], "yes" if p["per_model"] else "", p["meaning"])
        for p in found.get("parameters", ())
    ]
    if rows:
        table("Parameters", ("name", "default", "range", "per model", "meaning"), rows)
    elif "parameters" in found:
        say("No parameters.")
