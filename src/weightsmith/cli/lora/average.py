"""`weightsmith lora average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from weightsmith.cli.lora.options import DType, Out
from weightsmith.cli.options import Json, Overwrite, Quiet
from weightsmith.cli.shown.adapter import show
from weightsmith.cli.words import Parameter

__all__ = ["average"]


def average(
    run: Annotated[Path, Parameter(help="Output folder of a training run, with folders checkpoint-N in it.")],
    out: Out,
    /,
    *,
    last: Annotated[int, Parameter(help="How many checkpoints, counted from the end.", show_default=True)] = 5,
    every: Annotated[int | None, Parameter(help="Of these every N-th.")] = None,
    steps: Annotated[tuple[int, int] | None, Parameter(help="First and last step.")] = None,
    metric: Annotated[Literal["loss", "steps"], Parameter(help="What the weights follow.", show_default=True)] = "loss",
    penalty: Annotated[float, Parameter(help="How strongly: 0 is the plain average.", show_default=True)] = 1.0,
    rule: Annotated[Literal["power", "softmax", "rank"], Parameter(help="From loss to weight.")] = "power",
    source: Annotated[Literal["train", "eval"], Parameter(help="Which logged loss.", show_default=True)] = "train",
    smooth: Annotated[
        Literal["nearest", "since"], Parameter(help="The last logged loss, or the mean since the checkpoint before.")
    ] = "nearest",
    space: Annotated[
        Literal["factors", "product"], Parameter(help="Average A and B (one run), or their products.")
    ] = "factors",
    dtype: DType = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average the adapter checkpoints of one training run, weighted by the loss that the trainer logged."""
    from weightsmith.lora import average as combine

    result = combine(
        run,
        out,
        last=last,
        every=every,
        steps=steps,
        dtype=dtype,
        overwrite=overwrite,
        metric=metric,
        penalty=penalty,
        rule=rule,
        source=source,
        smooth=smooth,
        space=space,
    )
    show(result, json=json, quiet=quiet)
