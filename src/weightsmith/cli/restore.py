"""`weightsmith restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.result import summary
from weightsmith.cli.words import Parameter

__all__ = ["restore"]


def restore(
    folder: Annotated[Path, Parameter(help="Folder that compress has written.")],
    out: Out,
    /,
    *,
    expert: Annotated[str | None, Parameter(help="Name of the model to get back.")] = None,
    consensus: Annotated[int | None, Parameter(help="Instead: merge what at least this many models agree on.")] = None,
    scale: Annotated[float, Parameter(help="Of the consensus' task vector.", show_default=True)] = 1.0,
    base: Annotated[str | None, Parameter(help="Where the base is now, if not where it was.")] = None,
    dtype: Annotated[str | None, Parameter(help="Of the result; default: as the base stores it.")] = None,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Get one model back out of a compressed folder, or the consensus of all of them."""
    from weightsmith.jobs.compress import restore as run

    with progress_bar("restoring", quiet=quiet or json) as progress:
        result = run(
            folder,
            expert,
            out,
            settings,
            base=base,
            consensus=consensus,
            scale=scale,
            dtype=dtype,
            progress=progress,
        )
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')
