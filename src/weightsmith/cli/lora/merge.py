"""`weightsmith lora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.lora.options import Out
from weightsmith.cli.options import Json, Overwrite, Quiet, Sets
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.adapter import show
from weightsmith.cli.words import Parameter

__all__ = ["merge"]


def merge(
    recipe: Annotated[
        Path,
        Parameter(help="Recipe file, YAML or JSON: models: {math: PEFT FOLDER, code: PEFT FOLDER}, method: svd."),
    ],
    out: Out,
    /,
    *,
    set_: Sets = (),
    force: Annotated[bool, Parameter(help="Also combine adapters that name different bases.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Combine adapters into one: cat, svd, linear, ties, dare_*, magnitude_prune, *_svd, knots, mwa, average."""
    from weightsmith.lora import load, run

    made = load(recipe, set_)
    with progress_bar("combining", quiet=quiet or json, nbytes=False) as progress:
        result = run(made, out, force=force, overwrite=overwrite, progress=progress)
    show(result, json=json, quiet=quiet)
