"""What a search leaves in its folder: recipes, figures for programs, a page to look at, the front with sliders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import replace_file, writing
from weightsmith.io.package.card import yaml_text
from weightsmith.recipe.schema import Recipe
from weightsmith.report.figures import Curve, Curves
from weightsmith.report.html import Section, Text, page
from weightsmith.report.table import Column, Table
from weightsmith.search.front_page import front_page, short
from weightsmith.search.fronts import pick, preferences, shares
from weightsmith.search.result import Found, plain

__all__ = ["table", "words", "write", "write_pick"]

RESULT = "result.json"


def write(made: Found) -> list[Path]:
    """Write recipe.yaml, report.html, result.json; of a front front.html and a recipe for each of its points."""
    out = made.search.out
    files = {"report.html": page("Search", _sections(made)), RESULT: json.dumps(plain(made), indent=1) + "\n"}
    if made.front:
        with writing(out):
            system.call((out / "recipes").mkdir, exist_ok=True)
        for trial in made.front:
            files[f"recipes/{trial.number + 1}.yaml"] = _yaml(made.recipe(trial))
        files["front.html"] = front_page(made, words(made))
    files["recipe.yaml"] = _yaml(made.recipe(made.best))  # last: all is there
    return [replace_file(out / name, text.encode()) for name, text in files.items()]


def _yaml(recipe: Recipe) -> str:
    return yaml_text(recipe.model_dump(mode="json", exclude_defaults=True))


def write_pick(out: Path, prefer: str, to: Path | None) -> dict[str, Any]:
    """The point of a finished search's front that a preference likes best; its recipe is copied to `to`."""
    try:
        found = json.loads(system.read_file(out / RESULT))
        points, goals = found["front"], found["goals"]
    except OSError as error:
        raise OutputError(f"{out / RESULT}: {error.strerror or error}; is the search finished?") from None
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{out / RESULT}: not the result of a search") from None
    if not points:
        raise OutputError(f"{out}: this search looked for one number, so there is one recipe: {out / 'recipe.yaml'}")
    signs = [1.0 if goal == "max" else -1.0 for goal in goals.values()]
    values = [[s * p["scores"][name] for s, name in zip(signs, goals, strict=True)] for p in points]
    chosen = points[pick(shares(_array(values)), preferences(prefer, list(goals)))]
    recipe = out / chosen["recipe"]
    if to is not None:
        try:
            replace_file(to, system.read_file(recipe))
        except OSError as error:
            raise OutputError(f"{recipe}: {error.strerror or error}") from None
    return {**chosen, "recipe": str(to or recipe)}


def _array(values: Sequence[Sequence[float]]) -> Any:
    import numpy as np

    return np.array(values, float)


# --- words and tables ------------------------------------------------------------------------------


def words(made: Found) -> list[str]:
    """What was found, a sentence each."""
    search, cost = made.search, made.cost
    what = f"of {len(search.trials)} candidates ({search.sampler.name})"
    said = [f"best {what}: candidate {made.best.number + 1}, {search.spoken(made.best)}"]
    if made.front:
        said = [f"front {what}: {len(made.front)} points; all goals alike: {search.spoken(made.best)}"]
    if made.again is not None:
        said.append(f"scored again {made.again.times} times: {_with_interval(made.again)}")
    said.append(
        f"cost: {cost.evaluations} evaluations ({cost.failed} failed), {cost.build_seconds:.1f} s merging, "
        f"{cost.score_seconds:.1f} s scoring, {cost.read_bytes / 1e9:.2f} GB read; {cost.repeated} repeats scored once"
    )
    return [*said, *made.notes]


def _with_interval(again: Any) -> str:
    if again.low is None:
        why = "tells no items, nor an error" if again.error is None else "gives the same each time, and tells no items"
        return f"{again.value:.6g} (no interval: the evaluator {why})"
    return f"{again.value:.6g} (95%: {again.low:.6g} to {again.high:.6g})"


def table(made: Found) -> Table:
    """Held-out scores of the incumbent and of what it has to beat."""
    goals = list(made.search.aim.goals)
    several = len(goals) > 1
    columns = [
        Column("name", "model"),
        Column("search", "search split", 4, meaning="what was chosen by: it flatters what was chosen"),
        Column("report", "report split", 4, meaning="other data"),
        Column("interval", "95%"),
        *([Column(f"goal {goal}", goal, 4) for goal in goals] if several else []),
        Column("failed", ""),
    ]
    rows = []
    for line in made.lines:
        report = line.report
        interval = "" if report is None or report.low is None else f"{report.low:.4g} to {report.high:.4g}"
        rows.append(
            {
                "name": line.name,
                "search": line.search,
                "report": None if report is None else report.value,
                "interval": interval,
                "failed": line.failed,
                **{f"goal {goal}": line.scores.get(goal) for goal in goals},
            }
        )
    better = ", ".join(f"{name}: {goal}" for name, goal in made.search.aim.goals.items())
    note = f"{better}." + (
        " Of several scores: the sum that was searched by, of a front their mean." if several else ""
    )
    return Table("Held-out scores", columns, rows, [note], strong=frozenset([0]))


def _sections(made: Found) -> list[Section]:
    search = made.search
    found: list[Section] = [Text("", words(made)), table(made)]
    if search.aim.weights is not None:
        best, xs, ys = None, [], []
        for trial in search.trials:
            if trial.whole:
                value = search.aim.values(trial.scores or {})[0]
                best = value if best is None else max(best, value)
            if best is not None:
                xs.append(float(trial.number + 1))
                ys.append(search.aim.shown(best))
        if len(xs) > 1 and min(ys) >= 0:
            found.append(Curves("Best so far", [Curve("incumbent", xs, ys)], "candidate", "score on the search split"))
    rows = [{"gene": name, "value": short(value)} for name, value in made.best.point.items()]
    found.append(Table("The incumbent", [Column("gene", "gene"), Column("value", "value")], rows))
    columns = [
        Column("number", "candidate"),
        *(Column(goal, goal, 4) for goal in search.aim.goals),
        Column("items", "items"),
        Column("failed", "why not"),
    ]
    trials = [
        {"number": t.number + 1, **(t.scores or {}), "items": t.items, "failed": t.failed or ""} for t in search.trials
    ]
    return [*found, Table("All candidates", columns, trials, strong=frozenset([made.best.number]))]
