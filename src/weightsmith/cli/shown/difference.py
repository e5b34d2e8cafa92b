"""Differences of two models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightsmith.cli.show import say, table

if TYPE_CHECKING:
    from weightsmith.engine.compare import Change, Sums
    from weightsmith.inspect.difference import Difference

__all__ = ["plain", "show"]


def plain(found: Difference) -> dict[str, Any]:
    from weightsmith.engine.compare import gathered
    from weightsmith.inspect.difference import by_layer

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


def show(found: Difference, most: int) -> None:
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
