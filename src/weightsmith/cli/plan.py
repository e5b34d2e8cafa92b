"""`weightsmith plan`, and the dry run of `weightsmith merge`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from weightsmith.cli.options import DEFAULTS, Json, Plugins, RecipeFile, Run, Sweeps, read_variants
from weightsmith.cli.show import show_json
from weightsmith.cli.words import Parameter
from weightsmith.core.settings import Settings

if TYPE_CHECKING:
    from weightsmith.recipe.schema import Recipe

__all__ = ["plan", "preview"]


def plan(
    recipe: RecipeFile,
    out: Annotated[Path | None, Parameter(help="Folder to write; default: one in the working directory.")] = None,
    /,
    *,
    set_: Sweeps = (),
    settings: Run = DEFAULTS,
    json: Json = False,
    plugin: Plugins = (),
) -> int:
    """Show what would be read, done and written, and every problem, from file headers alone."""
    files: list[Path] = []
    variants = read_variants(recipe, set_, plugin, files)
    return preview(variants, out, settings.but(files=files), json=json)


def preview(variants: Mapping[str, Recipe], out: Path | None, settings: Settings, *, json: bool) -> int:
    """Print the plan, or what the plans of a sweep come to; 0, or 2 if there are problems."""
    from weightsmith.cli.shown.plan import facts, facts_of_all, show, show_all

    if len(variants) > 1:
        from weightsmith.jobs.sweep import plan_sweep

        swept = plan_sweep(variants, out or Path.cwd(), settings)
        if json:
            show_json(facts_of_all(swept))
        else:
            show_all(swept)
        return 2 if swept.problems else 0
    from weightsmith.jobs.merge import preview as plan_of

    made = plan_of(next(iter(variants.values())), out, settings)
    if json:
        show_json(facts(made))
    else:
        show(made)
    return 2 if made.problems else 0
