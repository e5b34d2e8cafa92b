"""`weightsmith lora extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.lora.options import DType, Energy, Out
from weightsmith.cli.options import Json, Overwrite, Quiet
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.adapter import show
from weightsmith.cli.words import Parameter

__all__ = ["extract"]


def extract(
    model: Annotated[Path, Parameter(help="The fine-tuned model.")],
    out: Out,
    /,
    *,
    base: Annotated[Path, Parameter(help="The model that it was fine-tuned from.")],
    rank: Annotated[int | None, Parameter(help="Rank of every module, at most.")] = None,
    energy: Energy = None,
    max_rank: Annotated[int, Parameter(help="Largest rank that an energy may ask for.", show_default=True)] = 128,
    epsilon: Annotated[float, Parameter(help="Leave out singular values up to this.")] = 0.0,
    uniform: Annotated[bool, Parameter(help="One rank for all modules, for programs without rank_pattern.")] = False,
    whole_embeddings: Annotated[bool, Parameter(help="Changed embeddings in full, instead of as LoRA.")] = False,
    skip: Annotated[bool, Parameter(help="Leave out changes that are no matrices (norms, biases).")] = False,
    include: Annotated[tuple[str, ...], Parameter(help="Only tensors that this glob matches; may be repeated.")] = (),
    exclude: Annotated[tuple[str, ...], Parameter(help="No tensors that this glob matches; may be repeated.")] = (),
    dtype: DType = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Get a LoRA adapter out of a fine-tuned model; says how much of each change it keeps."""
    from weightsmith.lora import extract as run

    with progress_bar("extracting", quiet=quiet or json, nbytes=False) as progress:
        result = run(
            str(model),
            str(base),
            out,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            epsilon=epsilon,
            uniform=uniform,
            whole_embeddings=whole_embeddings,
            skip=skip,
            include=include,
            exclude=exclude,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    show(result, json=json, quiet=quiet)
