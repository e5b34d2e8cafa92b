"""What was learned, as sections of a page: the curve, the coefficients, the predicted classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weightsmith.report.figures import BOTH, Curve, Curves, Heat
from weightsmith.report.html import Section, Text
from weightsmith.report.table import Column, Table
from weightsmith.tune.api import Tuned

__all__ = ["sections", "summary"]

ROWS = 400
"""Tensors that are drawn; of more, the first."""


def summary(made: Tuned) -> list[str]:
    """A few plain sentences."""
    losses = [row["loss"] for row in made.curve if "loss" in row]
    seen = [row["validation"] for row in made.curve if "validation" in row]
    said = []
    if losses:
        said.append(
            f"loss, the mean over tasks: {losses[0]:.4g} at the first step, {losses[-1]:.4g} at the last "
            f"({len(losses)} steps)"
        )
    if seen and made.best is not None:
        said.append(
            f"{made.judged} on validation data{', likewise' if made.judged == 'loss' else ''}: {seen[0]:.4g} before, "
            f"{made.best[0]:.4g} at step {made.best[1]}, whose numbers are taken"
        )
    if not losses and not made.stopped:
        said.append("no step was taken (steps: 0): the numbers are those of the start")
    elif made.best is None:
        said.append("no validation data: the numbers of the last step are taken")
    for control in made.controls[1:]:
        said.append(f"{control.name}: {control.loss:.4g} ({control.low:.4g} to {control.high:.4g}); "
                    f"tuned {made.controls[0].loss:.4g}")  # fmt: skip
    return [*said, *filter(None, (made.stopped, made.told))]


def sections(made: Tuned, models: Sequence[str]) -> list[Section]:
    """The page of a tuning."""
    found: list[Section] = [Text("", summary(made))]
    curves: dict[str, list[Curve]] = {}  # one picture for each measure
    for name, measure in (("loss", "loss"), ("validation", made.judged)):
        rows = [(row["step"], row[name]) for row in made.curve if name in row]
        if len(rows) > 1 and min(y for _, y in rows) >= 0:
            curves.setdefault(measure, []).append(Curve(name, [x for x, _ in rows], [y for _, y in rows]))
    for measure, drawn in curves.items():
        found.append(Curves(measure.capitalize(), drawn, "step", "mean over tasks" if measure == "loss" else measure))
    if made.controls:
        best = made.controls[0].loss
        compared: list[dict[str, object]] = [
            {"name": c.name, "loss": c.loss, "interval": f"{c.low:.4g} to {c.high:.4g}", "behind": c.loss - best}
            for c in made.controls
        ]
        headings = [Column("name", "What"), Column("loss", f"{made.judged.capitalize()}, validation", decimals=4),
                    Column("interval", "95% of bootstraps over batches"),
                    Column("behind", "Against the tuned", decimals=4, signed=True)]  # fmt: skip
        found.append(Table("Is it better than doing without?", headings, compared))
    for parameter, values in made.coefficients.items():
        found.append(_heat(parameter, dict(list(values.items())[:ROWS]), models))
    if made.classes:
        rows_ = [
            {"task": task, "class": name, "share": count / sum(counts.values())}
            for task, counts in made.classes.items()
            for name, count in sorted(counts.items(), key=lambda one: -one[1])[:10]
        ]
        columns = [
            Column("task", "Task"),
            Column("class", "Class"),
            Column("share", "Share of the answers", percent=True),
        ]
        found.append(Table("Predicted classes over the last steps", columns, rows_, group="task"))
    return found


def _heat(parameter: str, values: dict[str, Tensor], models: Sequence[str]) -> Heat:
    """Tensors down, models across; of several numbers for a tensor their mean."""
    means = {name: v.mean(dim=1) if v.ndim > 1 else v for name, v in values.items()}
    across = models if all(len(v) == len(models) for v in means.values()) else ["all models"]
    rows = [v.tolist() for v in means.values()]
    far = max((abs(x) for row in rows for x in row), default=0.0) or 1.0
    texts = [[f"{x:.3g}" for x in row] for row in rows]
    return Heat(f"{parameter}, by tensor", list(means), list(across), rows, texts, BOTH, (-far, far), parameter)
