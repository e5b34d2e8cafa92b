"""Ratios and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.agree import Agreement
from bench.measure import Usage
from bench.series import COPY, DURABLE, OURS, PROGRAMS, THEIRS, Memory, Run

__all__ = ["Ratio", "figures", "markdown", "memory_rows", "ratio", "ratio_rows", "usage_rows"]

Rows = list[list[str]]


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of the ratios of runs that followed each other."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f} to {self.high:.1f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The ratios over[i] / under[i], pair by pair (not the ratio of two medians)."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(median(each), min(each), max(each))


def figures(runs: Sequence[Run], merge: str, program: str, of: Callable[[Usage], float]) -> list[float]:
    """One figure of every repetition, in order."""
    found = [run for run in runs if (run.merge, run.program) == (merge, program)]
    return [of(run.usage) for run in sorted(found, key=lambda run: run.repetition)]


def usage_rows(runs: Sequence[Run]) -> Rows:
    """merge, program, and the medians of wall and processor seconds and of peak memory."""
    rows = [["merge", "program", "wall s", "CPU s", "peak RSS MB", "load"]]
    for merge in _merges(runs):
        for program in PROGRAMS:
            if not figures(runs, merge, program, lambda u: u.wall):
                continue
            wall, cpu, rss, load = (
                median(figures(runs, merge, program, of))
                for of in (lambda u: u.wall, lambda u: u.cpu, lambda u: u.rss / 1e6, lambda u: u.load)
            )
            rows.append([merge, program, f"{wall:.2f}", f"{cpu:.2f}", f"{rss:.0f}", f"{load:.1f}"])
    return rows


def ratio_rows(runs: Sequence[Run]) -> Rows:
    """How many times faster than mergekit, with less processor time and memory, and how many copies it costs."""
    rows = [
        ["merge", "mergekit : weightsmith, wall", "CPU", "peak RSS", "weightsmith : copy", "weightsmith : copy + fsync"]
    ]
    for merge in _merges(runs):
        cells = [merge]
        for of in (lambda u: u.wall, lambda u: u.cpu, lambda u: float(u.rss)):
            theirs = figures(runs, merge, THEIRS, of)
            cells.append(str(ratio(theirs, figures(runs, merge, OURS, of))) if theirs else "-")
        for copy in (COPY, DURABLE):
            walls = [figures(runs, merge, program, lambda u: u.wall) for program in (OURS, copy)]
            cells.append(str(ratio(*walls)))
        rows.append(cells)
    return rows


def memory_rows(found: Sequence[Memory]) -> Rows:
    """Predicted and measured peaks, their ratio, and the growth from the fewest to the most experts."""
    rows = [["merge", "experts", "plan MB", "measured MB", "measured : plan", "growth"]]
    for one in found:
        fewest = min((m for m in found if m.merge == one.merge), key=lambda m: m.experts)
        growth = "" if fewest is one else f"{one.measured / fewest.measured:.2f}"
        share = f"{one.measured / one.predicted:.2f}"
        megabytes = [f"{one.predicted / 1e6:.0f}", f"{one.measured / 1e6:.0f}"]
        rows.append([one.merge, str(one.experts), *megabytes, share, growth])
    return rows


def agreement_rows(found: Mapping[str, Agreement], exact: Mapping[str, tuple[int, int]]) -> Rows:
    """What the two programs' outputs have in common."""
    rows = [["merge", "float32: entries", "left to the sort", "bfloat16: unlike", "largest", "of the change", "spread"]]
    for merge in dict.fromkeys([*exact, *found]):
        entries, free = exact.get(merge, (0, 0))
        cells = [merge, f"{entries:,}", f"{free:,}"]
        if merge in found:
            one = found[merge]
            cells += [f"{one.unlike:.2%}", f"{one.largest:.1e}", f"{one.change:.2%}", f"{one.spread:.4f}"]
        rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    return rows


def markdown(rows: Rows) -> str:
    """A Markdown table; every column but the first aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(_pad(c, w, i) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _merges(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.merge for run in runs))
