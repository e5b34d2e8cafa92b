"""A grid of two parameters: all its merges in one read of the inputs, and a score for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.recipe.sweep import expand, load_variants, several
from weightsmith.report.figures import BLUE, Heat, figure
from weightsmith.report.units import size
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.drafts import Drafts
from weightsmith.studio.form import parameters_of, stages_of
from weightsmith.studio.jobs import Job
from weightsmith.studio.measured import Measured, check_words, measured
from weightsmith.studio.pages.compare import scoring
from weightsmith.studio.pages.recipe import about, default_out, out_of, saved
from weightsmith.studio.recipes import look
from weightsmith.studio.shelf import shelf

__all__ = ["every", "one", "score", "start"]

_MOST = 64


def every(studio: Studio, asked: Asked) -> Any:
    jobs = [job for job in studio.jobs.all() if "grid" in job.about]
    recipes = list(map(studio.places.shown, shelf(studio.places, details=False).recipes))
    chosen = asked("path") or (recipes[0] if recipes else "")
    paths: list[tuple[str, str]] = []
    if chosen:
        path = Drafts(studio.places).path(chosen)
        paths = list(_paths(look(studio.places, path, Drafts(studio.places).found(path).text).tree))
    return html("grid.html", title="Grid", page="grid", jobs=jobs, recipes=recipes, chosen=chosen, paths=paths,
                out=default_out(studio, studio.places.home / (chosen or "recipe"), "grid"))  # fmt: skip


def _paths(tree: Any) -> Iterator[tuple[str, str]]:
    """What --set can change: the path of every parameter, and its range."""
    if not isinstance(tree, Mapping):
        return
    stages = stages_of(tree)
    method = tree.get("method")
    for i, (name, own) in enumerate(stages):
        for p in parameters_of(name):
            first = next(j for j, (other, _) in enumerate(stages) if p.name in {q.name for q in parameters_of(other)})
            if p.name in own:
                yield f"method.{i}.{name}.{p.name}" if isinstance(method, list) else f"method.{name}.{p.name}", p.range
            elif first == i:
                yield f"parameters.{p.name}", p.range
    each = {p.name: p.range for name, _ in stages for p in parameters_of(name) if p.each}
    models = tree.get("models")
    for model in models if isinstance(models, Mapping) else ():
        yield from ((f"models.{model}.{name}", words) for name, words in each.items())


def start(studio: Studio, asked: Asked) -> Any:
    """Queue the merges of a grid."""
    path = saved(studio, asked)
    sets = []
    for key, values in ((asked("key1"), asked("values1")), (asked("key2"), asked("values2"))):
        if key and values.strip():
            sets.append(f"{key}={','.join(value for value in several(f'x={values}'))}")
    count = len(expand(sets))  # says what is wrong with the values
    if count < 2:
        raise RecipeError("give at least one parameter several values, as 0.1, 0.3, 0.5")
    if count > _MOST:
        raise RecipeError(f"{count} merges; a grid has at most {_MOST} here")
    load_variants(path, sets)  # says what is wrong with a recipe that they make
    out, name = out_of(studio, asked), studio.places.shown(path)
    words = ["merge", name, out, *(word for one in sets for word in ("--set", one))]
    job = studio.jobs.add(words, f"{count} merges of {name}", {**about(studio, path), "out": out, "grid": sets})
    return go(f"/grid/{job.id}", asked)


def one(studio: Studio, asked: Asked) -> Any:
    """The grid as a table: a folder in each cell, and its score where there is one."""
    job = studio.jobs.get(asked.path["id"])
    sets = _sets(job)
    keys = [text.partition("=")[0] for text in sets]
    values = [several(text) for text in sets]
    across = values[1] if len(values) > 1 else [""]
    names = list(expand(sets))
    jobs = studio.jobs.all()
    scores = measured(jobs)
    out = str(job.about["out"])
    found = [
        [_cell(studio, out, names[i * len(across) + j], scores) for j in range(len(across))]
        for i in range(len(values[0]))
    ]
    measures = list(dict.fromkeys(name for row in found for cell in row for name in cell["figures"]))
    measure = asked("measure") if asked("measure") in measures else (measures or [""])[0]
    return html(
        "grid_job.html", title=job.title, page="grid", job=job, keys=keys, down=values[0], across=across, cells=found,
        measures=measures, measure=measure, drawn=_drawn(keys, values[0], across, found, measure),
        there=any(cell["there"] for row in found for cell in row), evaluator=studio.evaluator,
        waiting=[one for one in jobs if job.id in (one.id, one.about.get("of")) and not one.over],
        scored=[one for one in jobs if one.about.get("of") == job.id],
    )  # fmt: skip


def _sets(job: Job) -> list[str]:
    sets = job.about.get("grid")
    if not isinstance(sets, list) or not sets or not all(isinstance(one, str) for one in sets):
        raise RecipeError(f"job {job.id} is no grid")
    return sets


def _cell(studio: Studio, out: str, name: str, scores: Mapping[str, Measured]) -> dict[str, Any]:
    shown = f"{out}/{name}"
    folder = studio.places.inside(shown)
    found = scores.get(shown, Measured({}))
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return {"path": shown, "there": folder.is_dir(), "size": size(nbytes), "figures": found.figures, "note": found.note}


def _drawn(keys: list[str], down: list[str], across: list[str], cells: list[list[dict[str, Any]]], measure: str) -> str:
    """One measure of all as a heat map; '' while there is none."""
    values = [[cell["figures"].get(measure) for cell in row] for row in cells]
    known = [v for row in values for v in row if v is not None and math.isfinite(v)]
    if not known:
        return ""
    texts = [["" if v is None else f"{v:.5g}" for v in row] for row in values]
    title = f"{measure}: {keys[0]} down" + (f", {keys[1]} across" if len(keys) > 1 else "")
    less = measure in ("perplexity", "bits per byte")
    low, high = min(known), max(known) if max(known) > min(known) else min(known) + 1
    values = [[v if v is None or math.isfinite(v) else (high if v > 0 else low) for v in row] for row in values]
    span, legend = ((high, low), "less is better; dark is best") if less else ((low, high), "")
    return figure(Heat(title[0].upper() + title[1:], down, across, values, texts, BLUE, span, legend))


def score(studio: Studio, asked: Asked) -> Any:
    """Queue one look at every merge of the grid."""
    job = studio.jobs.get(asked.path["id"])
    shown = [f"{job.about['out']}/{name}" for name in expand(_sets(job))]
    there = [name for name in shown if studio.places.inside(name).is_dir()]
    if not there:
        raise RecipeError("none of the merges is there; run the grid again")
    evaluator = scoring(studio, asked)
    noted = {"out": there[0], "beside": there[1:], "of": job.id}
    studio.jobs.add(check_words(there, "", False, evaluator), f"measure {len(there)} merges", noted)
    return go(f"/grid/{job.id}", asked)
