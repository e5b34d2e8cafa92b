"""`weightsmith moe calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run
from weightsmith.cli.show import progress_bar
from weightsmith.cli.words import Parameter

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[Path, Parameter(help="Folder that moe shrink has written.")],
    out: Out,
    /,
    *,
    data: Annotated[Path, Parameter(help=".txt, .jsonl, .npz or a folder of texts.")],
    original: Annotated[str | None, Parameter(help="The larger mixture; default: what MODEL was made from.")] = None,
    tokens: Annotated[int, Parameter(help="Of the data, at most.", show_default=True)] = 4096,
    steps: Annotated[int, Parameter(help="Of Adam, for each layer.", show_default=True)] = 100,
    rate: Annotated[float, Parameter(help="Size of a step, relative to the rows.", show_default=True)] = 0.01,
    length: Annotated[int, Parameter(help="Tokens per example.", show_default=True)] = 512,
    seed: Annotated[int, Parameter(help="Of the choice of examples and tokens.", show_default=True)] = 0,
    field: Annotated[str | None, Parameter(help="Which field of a .jsonl or .npz to read.")] = None,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit the routers of a smaller mixture to what the larger one's layers gave."""
    from weightsmith.cli.shown.mixture import calibrated
    from weightsmith.experts.calibrate import Fit
    from weightsmith.experts.calibrate import calibrate as run

    fit = Fit(tokens=tokens, steps=steps, rate=rate, length=length, seed=seed)
    with progress_bar("calibrating", quiet=quiet or json, nbytes=False) as progress:
        found = run(
            model, data, out, fit, settings.but(files=(data,)), original=original, device=settings.device, field=field,
            progress=progress,
        )  # fmt: skip
    calibrated(found, json=json, quiet=quiet)
