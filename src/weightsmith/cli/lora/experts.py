"""`weightsmith lora experts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.lora.options import DType
from weightsmith.cli.options import Json, Out, Overwrite, Quiet, chosen
from weightsmith.cli.show import progress_bar, say, show_json, size, table, warn
from weightsmith.cli.words import Parameter

__all__ = ["experts"]


def experts(
    twins: Annotated[Path, Parameter(help="Folder that compress made with twin (strategy svd).")],
    out: Out,
    /,
    *,
    router: Annotated[Path | None, Parameter(help="A trained router: its prototypes go along.")] = None,
    base: Annotated[Path | None, Parameter(help="Where the base is now, if not where it was.")] = None,
    dtype: DType = None,
    matrices_only: Annotated[
        bool, Parameter(help="Leave out scales and biases: adapters that keep such whole cannot be joined.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the shared model of a compressed folder, and one PEFT adapter per expert, for servers."""
    from weightsmith.runtime.export import export

    settings = chosen(overwrite=overwrite)
    with progress_bar("writing", quiet=quiet or json, nbytes=False) as progress:
        options = {"router": router, "base": base}
        result = export(
            twins, out, settings.but(progress=progress), **options, dtype=dtype, matrices_only=matrices_only
        )
    if json:
        show_json(result)
    elif not quiet:
        rows = [(name, str(one.rank), size(one.nbytes), f"{one.worst:.1e}") for name, one in result.adapters.items()]
        table("Adapters", ["expert", "rank", "size", "largest error"], rows, right=(1, 2, 3))
        for name, one in result.adapters.items():
            for warning in one.warnings:
                warn(f"{name}: {warning.text}")
        say(f"wrote {result.out}: shared/ is the model that they adapt; {result.index.name} lists them")
