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
from weightsmith.studio.shelf import shelf
from weightsmith.studio.tables import Table

__all__ = ["every", "one", "perplexities", "start"]

_LIMIT = 500_000_000


def every(studio: Studio, asked: Asked) -> Any:
    jobs = [job for job in studio.jobs.all() if job.verb == "diff"]
    names = [model.name for model in shelf(studio.places, details=False).models if model.kind != "adapter"]
    return html("compare.html", title="Compare", page="compare", jobs=jobs, names=names)


def start(studio: Studio, asked: Asked) -> Any:
    """Queue a comparison of the first model with one or two others, and a look at each if that is wished."""
    given = [asked(name).strip() for name in ("a", "b", "c")]
    names = [studio.places.shown(studio.places.inside(name)) for name in given if name]
    if len(names) < 2:
        raise RecipeError("choose two models to compare")
    if len(set(names)) < len(names):
        raise RecipeError("that is the same model twice; choose another")
    for name in names:
        for one in studio.places.strangers([name], studio.places.home):
            raise SourceError(f"{one!r} leads out of the folders that the studio was started with")
    first, *others = names
    made: Job | None = None
    for other in others:
        about = {"a": first, "b": other, **({"beside": made.id} if made is not None else {})}
        made = studio.jobs.add(["diff", first, other, "--json"], f"{first} and {other}", about)
    for name in names if asked("check") else ():
        studio.jobs.add(["check", name, "--json"], f"check {name}", {"out": name})
    assert made is not None
    return go(f"/compare/{made.id}", asked)


def one(studio: Studio, asked: Asked) -> Any:
    """One comparison, and the one beside it."""
    job = studio.jobs.get(asked.path["id"])
    if job.verb != "diff":
        raise RecipeError(f"job {job.id} is no comparison")
    if job.state != "finished":
        return go(f"/run/{job.id}", asked)
    told, rows = _answer(job)
    table = Table(("tensor", "shape", "|b-a|/|a|", "max |b-a|", "cosine", "changed"), rows, asked, f"compare/{job.id}")
    if asked.partial:
        return html("tensors.html", table=table)
    pairs = [(job, told)]
    beside = str(job.about.get("beside", ""))
    if beside.isdecimal():
        other = studio.jobs.get(beside)
        pairs = [(other, _answer(other)[0]), *pairs] if other.state == "finished" else pairs
    names = list(dict.fromkeys(str(one.about.get(key, "")) for one, _ in pairs for key in ("a", "b")))
    scores = perplexities(studio.jobs.all())
    return html(
        "comparison.html", title=job.title, page="compare", job=job, table=table,
        pairs=[(one, answer, figure(_map(one, answer))) for one, answer in pairs],
        scores=[(name, scores.get(name)) for name in names],
    )  # fmt: skip


def perplexities(jobs: list[Job]) -> Mapping[str, Mapping[str, Any]]:
    """Model -> what the last `weightsmith check --json` of it has measured: perplexity, bits_per_byte, tokens."""
    found: dict[str, Mapping[str, Any]] = {}
    for job in jobs:
        name = str(job.about.get("out", ""))
        if job.verb != "check" or "--json" not in job.words or not job.over or name in found or job.code not in (0, 2):
            continue
        try:
            told = job.answer()
            own = told["models"].get("merged", {})
            found[name] = own if own else {"note": "; ".join(map(str, [*told["problems"], *told["notes"]]))}
        except (SourceError, KeyError, TypeError, AttributeError):
            found[name] = {"note": "it could not be checked"}
    return found


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
