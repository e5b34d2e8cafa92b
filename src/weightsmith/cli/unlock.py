"""`weightsmith unlock`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run
from weightsmith.cli.show import progress_bar
from weightsmith.cli.words import Parameter

__all__ = ["unlock"]


def unlock(
    model: Annotated[Path, Parameter(help="The locked model, or with --base a LoRA adapter of it.")],
    out: Out,
    /,
    *,
    key: Annotated[Path, Parameter(help="File of its key.")],
    base: Annotated[Path | None, Parameter(help="The model of the adapter, locked or not.")] = None,
    no_compare: Annotated[bool, Parameter(help="Do not run the model before and after.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a locked model as it was before, up to the rounding of its dtype."""
    from weightsmith.cli.shown.lock import summary
    from weightsmith.protect.adapter import unlock_adapter
    from weightsmith.protect.run import unlock as run

    if base is not None:
        made = unlock_adapter(model, base, out, key, settings=settings)
    else:
        with progress_bar("unlocking", quiet=quiet or json) as progress:
            made = run(model, out, key, compare=not no_compare, settings=settings, progress=progress)
    summary(made, key, "unlocked", json=json, quiet=quiet)
