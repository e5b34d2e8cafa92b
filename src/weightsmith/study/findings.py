"""What cells say: the five findings of the scale study, and shares of merges above base and best, with statistics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.study.figures import tau
from weightsmith.study.scoring import wilson
from weightsmith.study.suite import Task

if TYPE_CHECKING:
    from weightsmith.study.suite_cells import Cell

__all__ = ["Finding", "findings", "shares", "sign_test"]

LEVEL = 0.05


@dataclass(frozen=True)
class Finding:
    """One statement, held against the cells.

    statistic  in words, with its numbers;  p: of a two-sided sign test, None where it has no pairs
    verdict    seen, reversed, not told apart, or not measured
    points     (series, x, y) of its figure
    """

    name: str
    says: str
    statistic: str
    verdict: str
    p: float | None = None
    points: tuple[tuple[str, float, float], ...] = ()
    x: str = ""
    y: str = ""


def sign_test(differences: Sequence[float]) -> tuple[int, int, float | None]:
    """(positive, negative, two-sided p) of paired differences; equal pairs do not count."""
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if not up + down:
        return 0, 0, None
    tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1)) / 2 ** (up + down)
    return up, down, min(1.0, 2 * tail)


def _verdict(up: int, down: int, p: float | None) -> str:
    if p is None:
        return "not told apart"
    return "not told apart" if p >= LEVEL else "seen" if up > down else "reversed"


def findings(
    cells: Sequence[Cell], trained: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[Task]
) -> list[Finding]:
    """The five findings of arXiv:2410.03617."""
    return [_strong(cells), _sizes(cells), _outside(cells, trained, tasks), _counts(cells), _methods(cells)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _points(
    cells: Sequence[Cell], series: Callable[[Cell], str], x: Callable[[Cell], float], y: Callable[[Cell], float | None]
) -> tuple[tuple[str, float, float], ...]:
    """Means of y by series and x."""
    groups: dict[tuple[str, float], list[float | None]] = {}
    for cell in cells:
        groups.setdefault((series(cell), x(cell)), []).append(y(cell))
    return tuple(
        (name, at, mean) for (name, at), values in sorted(groups.items()) if (mean := _mean(values)) is not None
    )


def _paired(
    cells: Sequence[Cell], one: Callable[[Cell], bool], other: Callable[[Cell], bool], *same: str
) -> list[float]:
    """held_in of `one` - of `other`, over cells that are alike in method, count, subset and `same`."""

    def key(cell: Cell) -> Any:
        return (cell.method, cell.count, cell.subset, *(getattr(cell, name) for name in same))

    first = {key(cell): cell.held_in for cell in cells if one(cell)}
    second = {key(cell): cell.held_in for cell in cells if other(cell)}
    return [a - b for at in first if at in second if (a := first[at]) is not None and (b := second[at]) is not None]


def _told(differences: Sequence[float], what: str) -> tuple[str, str, float | None]:
    """(statistic in words, verdict, p)."""
    up, down, p = sign_test(differences)
    if not differences:
        return f"no pairs of cells: {what}", "not measured", None
    shown = "" if p is None else f", sign test p = {p:.3g}"
    mean = statistics.fmean(differences)
    text = f"{what}: mean difference {mean:+.3f}, {up} of {len(differences)} pairs up, {down} down{shown}"
    return text, _verdict(up, down, p), p


def _strong(cells: Sequence[Cell]) -> Finding:
    text, verdict, p = _told(
        _paired(cells, lambda c: c.base == "strong", lambda c: c.base == "weak", "size"), "held-in, strong - weak base"
    )
    points = _points(cells, lambda c: c.base or "base", lambda c: c.size, lambda c: c.held_in)
    return Finding("1", "instruction-tuned bases merge better", text, verdict, p, points, "size", "held-in")


def _sizes(cells: Sequence[Cell]) -> Finding:
    sizes = sorted({cell.size for cell in cells})
    differences = (
        _paired(cells, lambda c: c.size == sizes[-1], lambda c: c.size == sizes[0], "base") if len(sizes) > 1 else []
    )
    text, verdict, p = _told(differences, "held-in, largest - smallest size")
    points = _points(cells, lambda c: c.method, lambda c: c.size, lambda c: c.held_in)
    return Finding("2", "larger models merge more easily", text, verdict, p, points, "size", "held-in")


def _outside(
    cells: Sequence[Cell], trained: Mapping[str, Mapping[str, Mapping[str, float]]], tasks: Sequence[Task]
) -> Finding:
    strong = [cell for cell in cells if cell.base == "strong"] or list(cells)
    gains = [cell.held_out - 1 for cell in strong if cell.held_out is not None]
    text, verdict, p = _told(
        gains, "held-out, merge / base - 1" + ("" if strong == list(cells) else " on strong bases")
    )
    outside = [task for task in tasks if task.role == "held-out"]
    joint = {}
    for rung, models in trained.items():
        if "joint" in models and outside:
            pairs = [(task.up(models["joint"][task.name]), task.up(models["base"][task.name])) for task in outside]
            joint[rung] = statistics.fmean(a / b if b else a for a, b in pairs)
    if joint:
        over = [
            cell
            for cell in cells
            if cell.rung in joint and cell.held_out is not None and cell.held_out > joint[cell.rung]
        ]
        text += f"; {len(over)} of {sum(cell.rung in joint for cell in cells)} cells above the joint model"
    points = _points(cells, lambda c: f"{c.base or 'base'} {c.size:g}", lambda c: c.count, lambda c: c.held_out)
    return Finding("3", "merging improves zero-shot generalisation", text, verdict, p, points, "experts", "held-out")


def _counts(cells: Sequence[Cell]) -> Finding:
    sizes = sorted({cell.size for cell in cells})
    slopes = {}
    for size in sizes:
        for group in sorted({(cell.method, cell.base) for cell in cells}):
            mine = [c for c in cells if c.size == size and (c.method, c.base) == group and c.held_in is not None]
            slopes[size, group] = _slope([c.count for c in mine], [c.held_in or 0.0 for c in mine])
    pairs = [
        large - small
        for (size, group), large in slopes.items()
        if size == sizes[-1] and len(sizes) > 1 and large is not None
        if (small := slopes.get((sizes[0], group))) is not None
    ]
    text, verdict, p = _told(pairs, "slope of held-in over the number of experts, largest - smallest size")
    by_size = {size: _mean([value for (at, _), value in slopes.items() if at == size]) for size in sizes}
    text += "; slopes " + ", ".join(f"{size:g}: {value:+.3f}" for size, value in by_size.items() if value is not None)
    points = _points(cells, lambda c: f"size {c.size:g}", lambda c: c.count, lambda c: c.held_in)
    return Finding("4", "larger models take more experts", text, verdict, p, points, "experts", "held-in")


def _slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    return statistics.linear_regression(x, y).slope if len(set(x)) > 1 else None


def _methods(cells: Sequence[Cell]) -> Finding:
    """Differences between methods: max - min of held-in over the methods of one base, count and subset."""
    groups: dict[Any, list[float]] = {}
    for cell in cells:
        if cell.held_in is not None:
            groups.setdefault((cell.size, cell.base, cell.count, cell.subset), []).append(cell.held_in)
    spans = {key: max(values) - min(values) for key, values in groups.items()}
    sizes = sorted({cell.size for cell in cells})
    pairs = [
        spans[(sizes[0], *key[1:])] - span
        for key, span in spans.items()
        if len(sizes) > 1 and key[0] == sizes[-1] and (sizes[0], *key[1:]) in spans
    ]
    text, verdict, p = _told(pairs, "spread between methods, smallest - largest size")
    by_size = {size: statistics.fmean([v for key, v in spans.items() if key[0] == size] or [0.0]) for size in sizes}
    text += "; spreads " + ", ".join(f"{size:g}: {value:.3f}" for size, value in by_size.items())
    text += _agreement(cells, sizes)
    points = tuple(("spread", size, value) for size, value in by_size.items())
    return Finding(
        "5", "at scale, from strong bases, methods are nearly equal", text, verdict, p, points, "size", "spread"
    )


def _agreement(cells: Sequence[Cell], sizes: Sequence[float]) -> str:
    """How alike smallest and largest size order the methods."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    means = [
        [_mean([c.held_in for c in cells if c.size == size and c.method == method]) or 0.0 for method in methods]
        for size in (sizes[0], sizes[-1])
    ]
    found = tau(*means) if len(sizes) > 1 else None
    return "" if found is None else f"; Kendall's tau of the methods' order, smallest and largest: {found:+.2f}"


def shares(cells: Sequence[Cell]) -> list[Finding]:
    """For every method, the share of merges above the base, and above the best checkpoint merged."""
    found = []
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [cell for cell in cells if cell.method == method]
        for name, hits in (("base", [c.above_base for c in mine]), ("best checkpoint", [c.above_best for c in mine])):
            low, high = wilson(sum(hits), len(hits))
            verdict = "mostly" if low > 0.5 else "mostly not" if high < 0.5 else "not told apart"
            text = f"{sum(hits)} of {len(hits)} merges, {sum(hits) / len(hits):.0%} [{low:.0%}, {high:.0%}]"
            flag = (lambda c: float(c.above_base)) if name == "base" else (lambda c: float(c.above_best))
            points = _points(mine, lambda c: c.method, lambda c: c.count, flag)
            found.append(
                Finding(method, f"above the {name}", text, verdict, None, points, "checkpoints merged", "share")
            )
    return found
