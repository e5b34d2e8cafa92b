"""The checkpoints of one run as one adapter, weighted by what the trainer logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.io.read.trainer import checkpoints, select
from weightsmith.lora.merge import merge
from weightsmith.lora.write import Written

__all__ = ["average"]


def average(
    run: str | Path,
    out: str | Path,
    *,
    last: int | None = 5,
    every: int | None = None,
    steps: Sequence[int] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    **parameters: Any,
) -> Written:
    """Average the adapters in the folders checkpoint-N of a training run into the folder `out`.

    last        only the last so many (None: all)
    every       of the selected ones every n-th, counted from the end
    steps       (first, last) step, both included
    parameters  of the method mwa: metric (loss, steps), penalty, rule, source (train, eval), smooth, space, rank

    Source: Metrics-Weighted Averaging, arXiv:2504.18580.  Optimiser states are not merged: training cannot go on from
    the result.  Raises SourceError or PlanError, one line, before anything is written.
    """
    chosen = select(checkpoints(Path(run).expanduser()), last, every, steps)
    return merge({path.name: path for path in chosen}, "mwa", out, dtype=dtype, overwrite=overwrite, **parameters)
