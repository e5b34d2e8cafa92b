"""`weightsmith restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from weightsmith.cli.merge import summary
from weightsmith.cli.options import Json, Quiet
from weightsmith.cli.show import progress_bar

__all__ = ["restore"]


def restore(
    folder: Annotated[Path, Parameter(help="Folder that compress has written.")],
    expert: Annotated[str, Parameter(help="Name of the model to get back.")],
    out: Annotated[Path, Parameter(help="Folder to write.")],
    /,
    *,
    overwrite: Annotated[bool, Parameter(help="Replace a folder that is not empty, as a whole.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Get one model back out of a compressed folder, as a folder of its own."""
    from weightsmith.run.compress import restore as run

    with progress_bar("restoring", quiet=quiet or json) as progress:
        result = run(folder, expert, out, overwrite=overwrite, progress=progress)
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')
