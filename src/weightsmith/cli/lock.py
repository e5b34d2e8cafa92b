"""`weightsmith lock`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run
from weightsmith.cli.show import progress_bar
from weightsmith.cli.words import Parameter

__all__ = ["lock"]

_PARTS = "What is changed, of qk,vo,heads,mlp: queries and keys, values and outputs, the order of heads, hidden units."


def lock(
    model: Annotated[Path, Parameter(help="The model to lock, or with --base a LoRA adapter of it.")],
    out: Out,
    /,
    *,
    key: Annotated[Path, Parameter(help="File of the key, mode 600; made where it is not there. Keep it to yourself.")],
    parts: Annotated[str, Parameter(help=_PARTS, show_default=True)] = "qk,vo,heads,mlp",
    condition: Annotated[float, Parameter(help="Largest condition number of a matrix.", show_default=True)] = 4.0,
    modules: Annotated[tuple[str, ...], Parameter(help="Glob of attentions and MLPs to lock; may be repeated.")] = (),
    seed: Annotated[int | None, Parameter(help="Draw the key from a number, which then is the key.")] = None,
    base: Annotated[Path | None, Parameter(help="The model of the adapter, locked or not.")] = None,
    no_compare: Annotated[bool, Parameter(help="Do not run the model before and after.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model in another basis that computes the same and cannot be merged naively.

    It is no protection against somebody with the base at hand; `audit` says what is left of it.
    """
    from weightsmith.cli.shown.lock import summary
    from weightsmith.protect.adapter import lock_adapter
    from weightsmith.protect.run import lock as run

    if base is not None:
        made = lock_adapter(model, base, out, key, settings=settings)
    else:
        with progress_bar("locking", quiet=quiet or json) as progress:
            made = run(
                model, out, key, parts=parts.split(","), condition=condition, modules=modules or ("*",), seed=seed,
                compare=not no_compare, settings=settings, progress=progress,
            )  # fmt: skip
    summary(made, key, "locked", json=json, quiet=quiet)
