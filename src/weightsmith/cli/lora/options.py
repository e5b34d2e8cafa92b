"""Options of all verbs on adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.words import Parameter

__all__ = ["DType", "Energy", "Out"]

Out = Annotated[
    Path,
    Parameter(help="PEFT folder to write.  It appears complete or not at all; an interrupted run begins anew."),
]
DType = Annotated[str | None, Parameter(help="Of the stored factors, as float32; default: as the inputs store theirs.")]
Energy = Annotated[
    float | None, Parameter(help="Per module the smallest rank that keeps this share of the squared singular values.")
]
