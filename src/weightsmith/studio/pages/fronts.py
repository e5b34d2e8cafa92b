"""Fronts: what searches have found, and the point that a preference chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.io.read.small import read_json
from weightsmith.report.figures import scatter
from weightsmith.search.fronts import pick, shares
from weightsmith.studio.asked import Asked, Studio, html
from weightsmith.studio.shelf import shelf

__all__ = ["every", "one"]

_LIMIT = 50_000_000


def every(studio: Studio, asked: Asked) -> Any:
    found = []
    for folder in shelf(studio.places, details=False).searches:
        try:
            told = _result(folder)
        except SourceError:
            continue
        found.append((studio.places.shown(folder), told))
    return html("fronts.html", title="Fronts", page="fronts", searches=found)


def one(studio: Studio, asked: Asked) -> Any:
    """One search: the points over two of its goals; sliders say what counts how much."""
    folder = studio.places.inside(asked("path"))
    told = _result(folder)
    goals = list(told["goals"])
    points = told["front"] or [{**told["best"], "recipe": "recipe.yaml"}]
    signs = np.array([1.0 if told["goals"][goal] == "max" else -1.0 for goal in goals])
    values = np.array([[float(point["scores"][goal]) for goal in goals] for point in points])
    weights = [float(asked.number(f"w{i}", 50, 100)) for i in range(len(goals))]
    chosen = pick(shares(values * signs), weights if any(weights) else [1.0] * len(goals))
    last = len(goals) - 1
    x, y = (asked.number(axis, min(i, last), last) for i, axis in enumerate("xy"))
    named = [(str(point["candidate"]), values[i, x], values[i, y]) for i, point in enumerate(points)]
    drawn = scatter(named, goals[x], goals[y], "Front", mark=frozenset([str(points[chosen]["candidate"])]))
    return html(
        "front_part.html" if asked.partial else "front.html", title=asked("path"), page="fronts", name=asked("path"),
        told=told, goals=goals, points=points, chosen=chosen, weights=[int(w) for w in weights], x=x, y=y, drawn=drawn,
        recipes=[studio.places.shown(folder / str(point["recipe"])) for point in points],
    )  # fmt: skip


def _result(folder: Path) -> dict[str, Any]:
    """What a search has left; SourceError where the file is not that."""
    told = read_json(folder / "result.json", _LIMIT)
    try:
        goals, points = dict(told["goals"]), [told["best"], *told["front"]]
        good = isinstance(told["goals"], dict) and goals and all(
            isinstance(point["scores"][goal], (int, float)) and isinstance(point["point"], dict)
            and str(point["candidate"]).isdigit() for point in points for goal in goals
        )  # fmt: skip
        good = good and all(isinstance(point["recipe"], str) for point in told["front"])
        told["sampler"], told["candidates"], told["notes"]
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise SourceError(f"{folder / 'result.json'}: not the result of a search")
    return dict(told)
