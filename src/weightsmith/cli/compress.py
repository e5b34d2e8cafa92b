"""`weightsmith compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Plugins, Quiet, RecipeFile, Run, Sets, read_recipe
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.result import summary
from weightsmith.cli.words import Parameter

__all__ = ["compress"]


def compress(
    recipe: RecipeFile,
    out: Out,
    /,
    *,
    set_: Sets = (),
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
    accept_loss: Annotated[
        bool,
        Parameter(help="Keep the result even if models come back worse than the bare base, or if no space is saved."),
    ] = False,
) -> None:
    """Store all models of a recipe in little more space than one; its method ends in a codec."""
    from weightsmith.jobs.compress import compress as run

    files: list[Path] = []
    made = read_recipe(recipe, set_, plugin, files)
    with progress_bar("compressing", quiet=quiet or json) as progress:
        result = run(made, out, settings, accept_loss=accept_loss, files=files, progress=progress)
    summary(
        result, json=json, quiet=quiet, next_step=f'"weightsmith restore {out} OUT --expert NAME" gets one model back'
    )
