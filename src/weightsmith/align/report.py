"""What is said of a layout and of an alignment: rows of tables, a summary, plain values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith.io.read.aligned import group_json

if TYPE_CHECKING:
    from weightsmith.align.fit import Fitted
    from weightsmith.align.layout import Layout
    from weightsmith.align.run import Aligned

__all__ = ["plain", "summary", "tables"]

Table = tuple[str, Sequence[str], list[tuple[object, ...]], Sequence[int]]
"""Title, columns, rows, and which columns are numbers."""


def tables(layout: Layout, found: Aligned | None = None) -> list[Table]:
    """What may be permuted, with what has moved, and what is frozen; blocks that are alike share a row."""
    free: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for group in layout.groups:
        inside = ", ".join(f"{small.size} {small.name}" for small in group.inside)
        moved = (0, 0) if found is None else _moved(found, group.name)
        free.setdefault((_pattern(group.name), group.kind, group.size, inside), []).append(moved)
    rows: list[tuple[object, ...]] = []
    for first, counts in free.items():
        moved, of = (sum(column) for column in zip(*counts, strict=True))
        share = () if found is None else (f"{moved / of:.1%}" if of else "0.0%",)
        rows.append((*first, len(counts), *share))
    columns = ["group", "kind", "units", "inside each", "groups", *([] if found is None else ["moved"])]
    frozen: dict[tuple[str, str], int] = {}
    for name, why in layout.frozen.items():
        key = _pattern(name), _pattern(why)
        frozen[key] = frozen.get(key, 0) + 1
    still: list[tuple[object, ...]] = [(name, count, why) for (name, why), count in frozen.items()]
    return [
        ("what may be permuted", columns, rows, (2, 4, 5)),
        ("frozen", ("group", "groups", "because"), still, (1,)),
    ]


def summary(found: Aligned, moving: object, reference: object, out: object) -> list[str]:
    """The figures of an alignment in a few lines, and what to do with it."""
    one = f'"{{model: {moving}, align: {out}}}"'
    if found.splits:
        one = f'"{{model: {reference}, align: {out}}}" and {one}, with the method linear'
    return [*_figures(found), f"wrote {out} in {found.seconds:.1f} s; in a recipe: {one}"]


def _figures(found: Aligned) -> list[str]:
    if found.aligned and not found.splits:
        return ["the models are aligned already: every unit stays where it is, and merging them needs no alignment"]
    first, then = found.distance
    cut = 1 - then / first if first else 0.0
    lines = [
        f"objective {found.before:.6g} -> {found.after:.6g}; distance of what moves {first:.4g} -> {then:.4g} "
        f"({cut:.1%} less)"
    ]
    if found.spectrum:
        before, after = (_mean(values) for values in zip(*found.spectrum.values(), strict=True))
        lines.append(f"alignment of singular vectors, mean over {len(found.spectrum)} matrices: "
                     f"{before:.3f} -> {after:.3f}")  # fmt: skip
    if found.splits:
        one = next(iter(found.splits.values()))
        merged, separate = one.merged.shape[1], one.separate.shape[1]
        lines.append(
            f"hidden units of every MLP: {merged} merged, {separate} of each model separate, {one.width} in all"
        )
    if found.fit is not None:
        lines += _fit(found.fit)
    return lines


def _fit(fit: Fitted) -> list[str]:
    shares = [after / before for before, after in fit.losses.values() if before > 0]
    lines = [f"least squares: {len(fit.losses)} layers, with {_mean(shares or [1.0]):.1%} of the error that means have"]
    if fit.short:
        name, (rank, inputs) = next(iter(fit.short.items()))
        lines.append(
            f"warning: the data do not decide {len(fit.short)} of them, for example {name} (rank {rank} of {inputs} "
            "inputs); give more --examples"
        )
    return lines


def plain(layout: Layout, found: Aligned | None = None) -> dict[str, Any]:
    """Everything as JSON has it, but the orders themselves."""
    said: dict[str, Any] = {"groups": [group_json(g) for g in layout.groups], "frozen": dict(layout.frozen)}
    if found is not None:
        said |= {name: getattr(found, name) for name in ("before", "after", "distance", "moved", "spectrum", "seconds")}
        said["aligned"] = found.aligned
        said["losses"] = {} if found.fit is None else dict(found.fit.losses)
        said["separate"] = {name: one.separate.shape[1] for name, one in found.splits.items()}
    return said


def _moved(found: Aligned, name: str) -> tuple[int, int]:
    """Units of a group, and of those inside it, that are not where they were."""
    counts = [c for group, c in found.moved.items() if group == name or group.startswith(f"{name}/")]
    return sum(moved for moved, _ in counts), sum(of for _, of in counts)


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)


def _pattern(text: str) -> str:
    """A name or sentence with * for the numbers of blocks."""
    return re.sub(r"(?<=[a-z_]\.)\d+(?=[./ ]|$)", "*", text)
