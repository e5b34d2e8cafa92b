"""Two or three models against each other: where they differ, and how well they do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.core.keys import layer_of, role_of
from weightsmith.inspect.run import ROLES
from weightsmith.io import system
from weightsmith.io.read.small import read_json
from weightsmith.report.figures import RED, Heat, figure
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.jobs import Job
from weightsmith.studio.known import near
from weightsmith.studio.measured import check_words, measured, prompted
from weightsmith.studio.shelf import shelf
from weightsmith.studio.tables import Table

__all__ = ["ask", "every", "one", "scoring", "start"]

_LIMIT, _PROMPT = 500_000_000, 20_000


def every(studio: Studio, asked: Asked) -> Any:
    jobs = [job for job in studio.jobs.all() if job.verb == "diff"]
    names = [model.name for model in shelf(studio.places, details=False).models if model.kind != "adapter"]
    return html("compare.html", title="Compare", page="compare", jobs=jobs, names=names,
                evaluator=studio.evaluator)  # fmt: skip


def start(studio: Studio, asked: Asked) -> Any:
    """Queue a comparison of the first model with one or two others, and a look at each if that is wished."""
    given = [asked(name).strip() for name in ("a", "b", "c")]
    names = [_found(studio, name) for name in given if name]
    if len(names) < 2:
        raise RecipeError("choose two models to compare")
    if len(set(names)) < len(names):
        raise RecipeError("that is the same model twice; choose another")
    for name in names:
        for one in studio.places.strangers([name], studio.places.home):
            raise SourceError(f"{one!r} leads out of the folders that the studio was started with")
    wished = _wished(studio, asked, names)
    first, *others = names
    made: Job | None = None
    for other in others:
        noted = {"a": first, "b": other, **({"beside": made.id} if made is not None else {})}
        made = studio.jobs.add(["diff", first, other, "--json"], f"{first} and {other}", noted)
    if asked("check") or asked("prompt").strip() or asked("score"):
        _measure(studio, wished)
    assert made is not None
    return go(f"/compare/{made.id}", asked)


def _found(studio: Studio, text: str) -> str:
    """A model as commands name it; SourceError with the nearest for one that neither is there nor is to be written."""
    path = studio.places.inside(text)
    outs = {studio.places.home / job.out for job in studio.jobs.all() if job.out and not job.over}
    if not path.exists() and not outs & {path, *path.parents}:
        names = [model.name for model in shelf(studio.places, details=False).models]
        raise SourceError(f"{text}: there is no such model{near(text, names)}")
    return studio.places.shown(path)


def one(studio: Studio, asked: Asked) -> Any:
    """One comparison, and the one beside it."""
    job = _comparison(studio, asked.path["id"])
    if job.state != "finished":
        return go(f"/run/{job.id}", asked)
    rows = _answer(job)[1]
    table = Table(("tensor", "shape", "|b-a|/|a|", "max |b-a|", "cosine", "changed"), rows, asked, f"compare/{job.id}")
    pair = _pair(studio, job)
    names, jobs = _names(pair), studio.jobs.all()
    known = measured(jobs)
    rows_of = {name: known.get(name) for name in names}
    columns = list(
        dict.fromkeys(["perplexity", "bits per byte", *(n for one in rows_of.values() if one for n in one.figures)])
    )
    waiting = [one for one in jobs if one.verb == "check" and not one.over and names[0] == one.about.get("out")]
    told_of = {
        "job": job, "names": names, "scores": rows_of, "columns": columns, "asked": prompted(jobs, names),
        "waiting": waiting, "evaluator": studio.evaluator,
    }  # fmt: skip
    if asked.partial:
        return html("measured.html", **told_of) if asked("part") else html("tensors.html", table=table)
    return html(
        "comparison.html", title=", ".join(names), page="compare", table=table,
        pairs=[(one, found, _drawn(one, found)) for one in pair for found in [_answer(one)[0]]], **told_of,
    )  # fmt: skip


def ask(studio: Studio, asked: Asked) -> Any:
    """Queue a measurement of the models of a comparison: a prompt, or the user's evaluator."""
    job = _comparison(studio, asked.path["id"])
    _measure(studio, _wished(studio, asked, _names(_pair(studio, job))))
    return go(f"/compare/{job.id}", asked)


def _wished(studio: Studio, asked: Asked, names: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The command that measures some models as a page asks for it, and what the queue notes of it."""
    prompt = asked("prompt").strip()
    if len(prompt) > _PROMPT:
        raise RecipeError(f"the prompt has {len(prompt):,} letters; at most {_PROMPT:,} are asked here")
    words = check_words(names, prompt, bool(asked("chat")), scoring(studio, asked))
    return words, {"out": names[0], "beside": names[1:], "prompt": prompt}


def _measure(studio: Studio, wished: tuple[list[str], dict[str, Any]]) -> None:
    words, about = wished
    studio.jobs.add(words, f"measure {', '.join([about['out'], *about['beside']])}", about)


def scoring(studio: Studio, asked: Asked) -> str:
    """The user's evaluator if a page asks for scores, else ''."""
    if asked("score") and not studio.evaluator:
        raise RecipeError("no evaluator was named; start the studio with --evaluator score.py")
    return studio.evaluator if asked("score") else ""


def _comparison(studio: Studio, number: str) -> Job:
    job = studio.jobs.get(number)
    if job.verb != "diff":
        raise RecipeError(f"job {job.id} is no comparison")
    return job


def _pair(studio: Studio, job: Job) -> list[Job]:
    """A comparison, after the one that it was asked for with."""
    beside = str(job.about.get("beside", ""))
    others = [other for other in studio.jobs.all() if other.id == beside and other.state == "finished"]
    return [*others, job]


def _names(jobs: list[Job]) -> list[str]:
    return list(dict.fromkeys(str(one.about.get(key, "")) for one in jobs for key in ("a", "b")))


def _answer(job: Job) -> tuple[Mapping[str, Any], list[tuple[Any, ...]]]:
    file = job.folder / "out"
    return _read(file, system.call(file.stat).st_mtime_ns)


@lru_cache(maxsize=4)
def _read(file: Path, changed: int) -> tuple[Mapping[str, Any], list[tuple[Any, ...]]]:
    told = read_json(file, _LIMIT)
    try:
        rows = [
            (name, "×".join(map(str, one["shape"])), one.get("relative"), one.get("max_abs"), one.get("cosine"),
             one["changed"])
            for name, one in told["tensors"].items()
        ]  # fmt: skip
        told["model"]["relative"], told["equal"]
    except (KeyError, TypeError, AttributeError):
        raise SourceError(f'{file}: not what "weightsmith diff --json" prints') from None
    return told, rows


def _drawn(job: Job, told: Mapping[str, Any]) -> str:
    """The map of a comparison; '' where the two have nothing in common that could differ."""
    made = _map(job, told)
    return figure(made) if made.down else ""


def _map(job: Job, told: Mapping[str, Any]) -> Heat:
    """Layers by roles; a cell is the tensor in it that differs most."""
    cells: dict[str, dict[str, float]] = {}
    for name, one in told["tensors"].items():
        value = one.get("relative")
        if isinstance(value, (int, float)) and math.isfinite(value):
            place = layer_of(name)
            row = cells.setdefault("outside" if place is None else f"{place[0]}.{place[1]}", {})
            row[role_of(name)] = max(row.get(role_of(name), 0.0), 100 * value)
    roles = [role for role in ROLES if any(role in row for row in cells.values())]
    stacks = {layer.rpartition(".")[0] for layer in cells if layer != "outside"}
    down = [layer.rpartition(".")[2] if len(stacks) == 1 else layer for layer in cells]
    values = [[row.get(role) for role in roles] for row in cells.values()]
    top = max((v for line in values for v in line if v is not None), default=1.0) or 1.0
    texts = [["" if v is None else f"{v:.3g}" for v in line] for line in values]
    return Heat(
        f"{job.about.get('b', 'b')} against {job.about.get('a', 'a')}: |b - a| / |a|, %", down, roles, values, texts,
        RED, (0, top), note="By layer and role: the tensor that differs most.",
    )  # fmt: skip
