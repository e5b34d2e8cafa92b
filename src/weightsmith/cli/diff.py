"""`weightsmith diff`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from weightsmith.cli.options import Json, Quiet, Threads, chosen
from weightsmith.cli.show import progress_bar, say, show_json, table
from weightsmith.cli.words import Parameter

if TYPE_CHECKING:
    from weightsmith.inspect.difference import Change, Difference, Sums

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
        found = compare(first, second, threads=chosen(threads=threads).threads, progress=progress)
    if json:
        show_json(_plain(found))
    elif not quiet:
        _show(found, tensors)
    return 0 if found.equal else 1


def _plain(found: Difference) -> dict[str, Any]:
    from weightsmith.inspect.difference import by_layer, gathered

    return {
        "a": found.a,
        "b": found.b,
        "equal": found.equal,
        "model": _figures(gathered(found.changes)),
        "layers": {layer: _figures(sums) for layer, sums in by_layer(found.changes).items()},
        "tensors": {
            c.name: {
                "same": c.same,
                "shape": c.shape,
                "dtypes": c.dtypes,
                "changed": c.changed,
                **({} if c.sums is None else _figures(c.sums)),
            }
            for c in found.changes
        },
        "only_a": {key.name: {"shape": key.shape, "dtype": key.dtype} for key in found.only_a},
        "only_b": {key.name: {"shape": key.shape, "dtype": key.dtype} for key in found.only_b},
        "shapes": {name: {"a": there, "b": here} for name, there, here in found.shapes},
    }


def _figures(sums: Sums) -> dict[str, Any]:
    return {
        "relative": sums.relative,
        "max_abs": sums.max_abs,
        "cosine": sums.cosine,
        "changed": sums.changed,
        "entries": sums.numel,
    }


def _show(found: Difference, most: int) -> None:
    from weightsmith.inspect.difference import by_layer

    titles, right = ["|b-a|/|a|", "max |b-a|", "cosine", "changed"], (1, 2, 3, 4)
    layers = {layer: sums for layer, sums in by_layer(found.changes).items() if sums.changed}
    table("Layers that differ", ["layer", *titles], [(n or "(outside)", *_cells(s)) for n, s in layers.items()], right)
    unlike = sorted((c for c in found.changes if not c.same), key=_size, reverse=True)
    rows = [(c.name, *(_counted(c) if c.sums is None else _cells(c.sums))) for c in unlike[:most]]
    shown = f"Tensors that differ ({len(unlike)} of {len(found.changes)}" + (
        f", the first {most})" if len(unlike) > most else ")"
    )
    table(shown, ["tensor", *titles], rows, right)
    for label, keys in ((found.a, found.only_a), (found.b, found.only_b)):
        rows = [(key.name, "x".join(map(str, key.shape)), key.dtype) for key in keys]
        table(f"Only in {label}", ["tensor", "shape", "dtype"], rows)
    table("Shapes that differ", ["tensor", "a", "b"], [(n, list(x), list(y)) for n, x, y in found.shapes])
    dtypes: dict[tuple[str, str], int] = {}
    for change in found.changes:
        if change.dtypes[0] != change.dtypes[1]:
            dtypes[change.dtypes] = dtypes.get(change.dtypes, 0) + 1
    table("Dtypes that differ", ["a", "b", "tensors"], [(*pair, count) for pair, count in dtypes.items()], (2,))
    same = sum(c.same for c in found.changes)
    if found.equal:
        say(f"equal: {same} tensors, every value")
    else:
        say(f"{same} of {len(found.changes)} common tensors have equal values")


def _size(change: Change) -> float:
    if change.sums is None or math.isnan(change.sums.relative):
        return math.inf
    return change.sums.relative


def _cells(sums: Sums) -> tuple[str, ...]:
    cosine = "" if sums.cosine is None else f"{sums.cosine:.6f}"
    return f"{sums.relative:.3g}", f"{sums.max_abs:.3g}", cosine, f"{sums.changed / max(sums.numel, 1):.1%}"


def _counted(change: Change) -> tuple[str, ...]:
    return "", "", "", f"{change.changed:,} entries"
