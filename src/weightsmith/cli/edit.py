"""`weightsmith edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Overwrite, Quiet
from weightsmith.cli.show import say
from weightsmith.cli.words import Parameter

__all__ = ["edit"]


def edit(
    model: Annotated[Path, Parameter(help="The model to change.")],
    out: Annotated[Path, Parameter(help="Folder to write; it appears when it is complete.")],
    /,
    *,
    scale: Annotated[tuple[str, ...], Parameter(help="LAYER.HEAD.COMPONENT=FACTOR, as 7.9.0=0; may be repeated.")],
    fold: Annotated[
        bool, Parameter(help="Components as `heads` numbers them with folded norms.", show_default=True)
    ] = True,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Scale components of attention heads, as `weightsmith heads` numbers them; only W_O changes."""
    from weightsmith.align.edit import edit as run
    from weightsmith.align.edit import parse_scales

    result = run(model, out, parse_scales(scale), fold=fold, overwrite=overwrite)
    if not quiet:
        say(f"wrote {result.out}: {len(scale)} components scaled")
