"""A multi-task run as a page: every task's curve, what it reached, what the mechanism tells of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.report.figures import Curve, Curves
from weightsmith.report.html import Section, Text, page
from weightsmith.report.table import Column, Table
from weightsmith.train.loop import Row
from weightsmith.train.multitask.data import Tasks

__all__ = ["curves"]

_DRAWN = (
    ("score", "Validation score", "score"),
    ("valid", "Validation loss", "loss"),
    ("loss", "Training loss", "loss"),
)


def curves(rows: Sequence[Row], tasks: Tasks, scores: Mapping[str, float], info: Mapping[str, Any]) -> str:
    """The page of a finished run."""
    records = [
        {"task": n, "examples": len(t.parts["train"]), "metric": t.metric, "test": scores.get(n)}
        for n, t in tasks.items()
    ]
    columns = (
        Column("task", "Task"),
        Column("examples", "Examples"),
        Column("metric", "Metric"),
        Column("test", "Test", 3, meaning="On the test examples; without a file of their own, on those of validation."),
    )
    sections: list[Section] = [Table("Tasks", columns, records)]
    for key, title, axis in _DRAWN:
        lines = [
            Curve(name, [row.step for row in seen], [row.figures[f"{name}/{key}"] for row in seen])
            for name in tasks
            if (seen := [row for row in rows if f"{name}/{key}" in row.figures])
        ]
        if lines:
            sections.append(Curves(title, lines, "step", axis))
    if told := info["told"]:
        sections.append(
            Text("What the mechanism tells", [f"{key}: {json.dumps(value)}" for key, value in told.items()])
        )
    if info["notes"]:
        sections.append(Text("Notes", list(info["notes"])))
    sections.append(Text("What was asked for", [json.dumps(info["recipe"])]))
    return page("Multi-task training", sections)
