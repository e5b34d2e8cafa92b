"""`weightsmith diff`."""

from __future__ import annotations

from typing import Annotated

from weightsmith.cli.options import Json, Quiet, Threads, chosen
from weightsmith.cli.show import progress_bar, show_json
from weightsmith.cli.words import Parameter

__all__ = ["diff"]


def diff(
    a: Annotated[str, Parameter(help="A model: folder, weight file or hub id[@revision].")],
    b: Annotated[str, Parameter(help="The model to compare it with.")],
    /,
    *,
    base: Annotated[str | None, Parameter(help="The base model, where A or B is a LoRA adapter.")] = None,
    tensors: Annotated[int, Parameter(help="Show so many tensors, those that differ most.", show_default=True)] = 20,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say which tensors of two models differ, and by how much, for each layer.

    Exit codes are those of diff: 0 if the models are equal, 1 if they differ, 2 on trouble.
    """
    from weightsmith.cli.shown.difference import plain, show
    from weightsmith.core.errors import RecipeError
    from weightsmith.inspect.difference import compare
    from weightsmith.io.read.open import open_source

    if tensors < 0:
        raise RecipeError(f"--tensors {tensors} is outside [0, inf)")
    origin = None if base is None else open_source(base)
    first, second = open_source(a, base=origin), open_source(b, base=origin)
    for source in (first, second):
        source.prepare()
    with progress_bar("comparing", quiet=quiet or json, nbytes=False) as progress:
        found = compare(first, second, chosen(threads=threads, progress=progress))
    if json:
        show_json(plain(found))
    elif not quiet:
        show(found, tensors)
    return 0 if found.equal else 1
