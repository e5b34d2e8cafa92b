"""Inspections: what the models of a recipe will do to each other, as `weightsmith inspect` measures it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.inspect.facts import pairs
from weightsmith.inspect.run import SIDE, Inspection
from weightsmith.inspect.show import figures, from_plain, summary
from weightsmith.io import system
from weightsmith.io.read.small import read_json
from weightsmith.report.figures import figure
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.form import summaries
from weightsmith.studio.pages.recipe import about, saved
from weightsmith.studio.shelf import shelf
from weightsmith.studio.tables import Table

__all__ = ["every", "one", "start"]

_LIMIT = 500_000_000


def every(studio: Studio, asked: Asked) -> Any:
    jobs = [job for job in studio.jobs.all() if job.verb == "inspect"]
    recipes = list(map(studio.places.shown, shelf(studio.places, details=False).recipes))
    return html("inspect.html", title="Inspect", page="inspect", jobs=jobs, recipes=recipes, side=SIDE)


def start(studio: Studio, asked: Asked) -> Any:
    """Queue an inspection."""
    path = saved(studio, asked)
    name = studio.places.shown(path)
    side = asked.number("spectra", SIDE, 1_000_000)
    job = studio.jobs.add(
        ["inspect", name, "--json", *([] if side == SIDE else ["--spectra", str(side)])],
        f"inspect {name}",
        about(studio, path),
    )
    return go(f"/inspect/{job.id}", asked)


def one(studio: Studio, asked: Asked) -> Any:
    """One inspection: advice, maps, every tensor."""
    job = studio.jobs.get(asked.path["id"])
    if job.verb != "inspect":
        raise RecipeError(f"job {job.id} is no inspection")
    if job.state != "finished":
        return go(f"/run/{job.id}", asked)
    file = job.folder / "out"
    found, rows = _read(file, system.call(file.stat).st_mtime_ns)
    columns = ("tensor", "weights", "|tau|/|base|", "cosine", "sign conflict", "outvoted mass", "interference")
    table = Table(columns, rows, asked, f"inspect/{job.id}")
    if asked.partial:
        return html("tensors.html", table=table)
    known = summaries()
    advice = [(one, [name for name in one.methods if name in known]) for one in found.advice]
    return html(
        "inspection.html", title=job.title, page="inspect", job=job, table=table, advice=advice,
        summary=summary(found), figures=list(map(figure, figures(found))), recipe=str(job.about.get("recipe", "")),
    )  # fmt: skip


@lru_cache(maxsize=2)
def _read(file: Path, changed: int) -> tuple[Inspection, list[tuple[Any, ...]]]:
    """An inspection and a row for each of its tensors; read once for all pages of a long table."""
    found = from_plain(read_json(file, _LIMIT))
    rows = [
        (name, m.entries, _mean(m.relative), _mean(pairs(m.cosine)), m.conflict, m.outvoted,
         m.spectra.by_chance if m.spectra else None)
        for name, m in found.tensors.items()
    ]  # fmt: skip
    return found, rows


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
