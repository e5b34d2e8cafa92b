"""Cells and findings as tables, Markdown, CSV and one HTML page."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

from weightsmith.report.figures import Curve, Curves
from weightsmith.report.html import Section, Text, page
from weightsmith.report.table import Column, Table, markdown
from weightsmith.study.findings import Finding
from weightsmith.study.suite_cells import Cell, CellsResult

__all__ = ["csv_text", "document", "in_words", "markdown_page", "tables"]


def finding_table(result: CellsResult) -> Table:
    columns = (
        Column("name", ""),
        Column("says", "statement"),
        Column("verdict", "verdict"),
        Column("statistic", "statistic"),
    )
    note = (
        "seen or reversed: two-sided sign test over paired cells, p < 0.05. mostly: the 95% interval lies above a half."
    )
    return Table("Findings", columns, [vars(one) for one in result.findings], (note,))


def cell_table(result: CellsResult) -> Table:
    """Mean and spread over the subsets."""
    groups: dict[tuple[str, float, str, str, int], list[Cell]] = {}
    for cell in result.cells:
        groups.setdefault((cell.rung, cell.size, cell.base, cell.method, cell.count), []).append(cell)
    rows = [
        {"rung": rung, "size": size or None, "base": base, "method": method, "count": count, "subsets": len(found),
         **_of([c.held_in for c in found], "held_in"), **_of([c.held_out for c in found], "held_out"),
         **_of([c.mean for c in found], "mean"), "marked": "difference" if any(c.marked for c in found) else ""}
        for (rung, size, base, method, count), found in groups.items()
    ]  # fmt: skip
    columns = [
        Column("rung", "base"), Column("size", "size", 3), Column("base", "kind"), Column("method", "method"),
        Column("count", "experts", 0), Column("subsets", "subsets", 0), Column("held_in", "held-in", 3),
        Column("held_in_std", "±", 3), Column("held_out", "held-out", 3), Column("held_out_std", "±", 3),
        Column("mean", "mean", 3), Column("mean_std", "±", 3), Column("marked", "marked"),
    ]  # fmt: skip
    shown = [column for column in columns if any(row.get(column.key) not in (None, "") for row in rows)]
    return Table(result.title, shown, rows, (result.rule, *result.warnings), "rung")


_FACTORS = {"size": "size", "kind of base": "base", "method": "method", "experts": "count"}


def effect_table(result: CellsResult) -> Table:
    """What each factor alone does: means over all cells that have a value of it."""
    rows: list[dict[str, Any]] = []
    for factor, name in _FACTORS.items():
        groups: dict[Any, list[Cell]] = {}
        for cell in result.cells:
            groups.setdefault(getattr(cell, name), []).append(cell)
        for level, found in sorted(groups.items()) if len(groups) > 1 else ():
            means = {key: _of([getattr(cell, key) for cell in found], key)[key] for key in _MEANS}
            shown = f"{level:g}" if isinstance(level, float) else str(level)
            rows.append({"factor": factor, "level": shown, "cells": len(found), **means})
    columns = [Column("factor", "factor"), Column("level", "value"), Column("cells", "cells", 0)]
    columns += [Column(key, name, 3) for key, name in _MEANS.items() if any(row[key] is not None for row in rows)]
    return Table("What each factor does, over all others together", columns, rows, (), "factor")


_MEANS = {"held_in": "held-in", "held_out": "held-out", "mean": "mean"}


def trained_table(result: CellsResult) -> Table:
    """Base, experts and the joint model, every task as its evaluator gave it."""
    rows = [
        {"rung": rung, "name": name, **{f"task {task}": score for task, score in scores.items()}}
        for rung, models in result.trained.items()
        for name, scores in models.items()
    ]
    tasks = dict.fromkeys(key for row in rows for key in row if key.startswith("task "))
    columns = [*([Column("rung", "base")] if any(result.trained) else []), Column("name", "model"),
               *(Column(key, key.removeprefix("task "), 3) for key in tasks)]  # fmt: skip
    return Table("Base and experts", columns, rows, (), "rung")


def _of(values: list[Any], name: str) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        name: statistics.fmean(known) if known else None,
        f"{name}_std": statistics.stdev(known) if len(known) > 1 else None,
    }


def cost_table(result: CellsResult) -> Table:
    rows = [
        {"name": name, "merge": c.merge_seconds, "evaluate": c.evaluate_seconds, "read": c.read_bytes / 1e6}
        for name, c in result.costs.items()
    ]
    columns = (Column("name", ""), Column("merge", "merge, s", 2), Column("evaluate", "evaluate, s", 1),
               Column("read", "read, MB", 1))  # fmt: skip
    return Table("Costs, all cells together", columns, rows)


def tables(result: CellsResult) -> list[Table]:
    """What a terminal shows, in order."""
    failed = [{"what": line} for line in (*result.failed, *(f"{k}: {v}" for k, v in result.left_out.items()))]
    found = [
        finding_table(result),
        cell_table(result),
        effect_table(result),
        trained_table(result),
        cost_table(result),
        Table("Not merged", (Column("what", ""),), failed),
    ]
    return [one for one in found if one.rows]


def in_words(result: CellsResult) -> list[str]:
    """A sentence per finding."""
    return [*result.warnings, *(f"{one.name}. {one.says}: {one.verdict} ({one.statistic})" for one in result.findings)]


def markdown_page(result: CellsResult) -> str:
    parts = [f"## {result.title}", f"Source: {result.source}", "\n".join(f"- {line}" for line in in_words(result))]
    parts += [f"**{one.title}**\n\n{markdown(one).rstrip()}" for one in tables(result)]
    return "\n\n".join(parts) + "\n"


def csv_text(result: CellsResult) -> str:
    """A line per cell."""
    text = io.StringIO()
    tasks = list(result.cells[0].scores) if result.cells else []
    names = [
        "rung",
        "size",
        "base",
        "method",
        "count",
        "subset",
        "mean",
        "held_in",
        "held_out",
        "above_base",
        "above_best",
    ]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *tasks])
    for cell in result.cells:
        plain = {**vars(cell), "subset": " ".join(cell.subset)}
        writer.writerow([*(plain[name] for name in names), *(cell.scores[task] for task in tasks)])
    return text.getvalue()


def document(result: CellsResult) -> str:
    """One HTML page with a figure per finding."""
    sections: list[Section] = [Text("In words", [result.source, *in_words(result)])]
    sections += [_figure(one) for one in result.findings if one.points]
    sections += tables(result)
    return page(result.title, sections)


def _figure(one: Finding) -> Curves:
    names = dict.fromkeys(name for name, _, _ in one.points)
    curves = [
        Curve(
            name,
            [x for series, x, _ in one.points if series == name],
            [y for series, _, y in one.points if series == name],
        )
        for name in names
    ]
    return Curves(f"{one.name}. {one.says}: {one.verdict}", curves, one.x, one.y, one.statistic)
