"""`weightsmith lora resize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.lora.options import DType, Energy, Out
from weightsmith.cli.options import Json, Overwrite, Quiet
from weightsmith.cli.shown.adapter import show
from weightsmith.cli.words import Parameter

__all__ = ["resize"]


def resize(
    adapter: Annotated[Path, Parameter(help="PEFT folder.")],
    out: Out,
    /,
    *,
    rank: Annotated[int | None, Parameter(help="Rank of every module, at most.")] = None,
    energy: Energy = None,
    dtype: DType = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Lower the rank of an adapter, with the smallest possible error."""
    from weightsmith.lora import resize as run

    show(run(adapter, out, rank=rank, energy=energy, dtype=dtype, overwrite=overwrite), json=json, quiet=quiet)
