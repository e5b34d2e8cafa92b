"""`weightsmith find`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Json, Quiet
from weightsmith.cli.show import progress_bar
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

__all__ = ["find"]

_PROBE = "Field to read out of the hits' vectors, as parameters.density."
_IN = "Folder with recipes, manifests (weightsmith.json) and model cards."


def find(
    query: Annotated[Path, Parameter(help="Example: a YAML or JSON file with the fields that are wanted.")],
    /,
    *,
    in_: Annotated[Path, Parameter(name="--in", help=_IN)],
    count: Annotated[int, Parameter(help="Hits to show.", show_default=True)] = 10,
    probe: Annotated[str | None, Parameter(help=_PROBE)] = None,
    weight: Annotated[tuple[str, ...], Parameter(help="GLOB=WEIGHT of fields, as models.*=0.2; may be repeated.")] = (),
    dim: Annotated[int, Parameter(help="Length of the vectors.", show_default=True)] = 1024,
    seed: Annotated[int, Parameter(help="Of all atoms and matrices.", show_default=True)] = 0,
    index: Annotated[Path | None, Parameter(help="Index file; default: .weightsmith-index in the folder.")] = None,
    rebuild: Annotated[bool, Parameter(help="Make the index anew.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find recipes and models by example: near numbers and words are near, fields that are not named count nothing."""
    from weightsmith.cli.shown.find import show, weights_of
    from weightsmith.vsa.encode import Encoder
    from weightsmith.vsa.search import find as run

    if count < 1:
        raise RecipeError(f"--count {count} is outside [1, inf)")
    said: list[str] = []
    encoder = Encoder(dim=dim, seed=seed, weights=weights_of(weight), warn=said.append)
    with progress_bar("reading", quiet=quiet or json, nbytes=False) as progress:
        found = run(query, in_, encoder, count=count, path=probe, index=index, rebuild=rebuild, progress=progress)
    show(found, [*said, *found.warnings], probe, json=json, quiet=quiet)
