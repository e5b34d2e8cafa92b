"""Runs: the queue, and one job with its progress, its log, and what can be done about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from weightsmith.core.errors import OutputError, SourceError
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.report.units import duration, size
from weightsmith.studio.asked import Asked, Studio, go, html
from weightsmith.studio.jobs import Job
from weightsmith.studio.places import OutsideError

__all__ = ["check", "events", "every", "one", "remove", "resume", "stop", "verify"]

WRITES = ("merge", "compress", "restore")


def every(studio: Studio, asked: Asked) -> Any:
    jobs = studio.jobs.all()
    if asked.partial:
        return html("jobs.html", jobs=jobs, told=told)
    return html("run.html", title="Run", page="run", jobs=jobs, told=told)


def one(studio: Studio, asked: Asked) -> Any:
    job = studio.jobs.get(asked.path["id"])
    return html("job.html", title=job.title, page="run", job=job, now=_now(job), writes=job.verb in WRITES)


def events(studio: Studio, asked: Asked) -> Any:
    """Server-sent events: the job's state whenever it changes, until it is over."""
    from fastapi.responses import StreamingResponse

    number = asked.path["id"]
    studio.jobs.get(number)

    async def stream() -> AsyncIterator[str]:
        last = ""
        while True:
            job = await asyncio.to_thread(studio.jobs.get, number)
            told = json.dumps(await asyncio.to_thread(_now, job))
            if told != last:
                last = told
                yield f"data: {told}\n\n"
            if job.over:
                return
            if studio.ending.is_set():
                yield "event: ending\ndata: \n\n"
                return
            await asyncio.sleep(0.25)

    return StreamingResponse(stream(), media_type="text/event-stream")


def _now(job: Job) -> dict[str, Any]:
    """What the page of a job shows of it."""
    progress = job.progress()
    return {
        "state": job.state,
        "over": job.over,
        "share": 1.0 if job.state == "finished" else progress.share if progress else 0.0,
        "words": told(job),
        "log": job.log(),
        "output": "" if "--json" in job.words else job.output(),
    }


def told(job: Job) -> str:
    """How far a job is, in words."""
    progress = job.progress()
    if job.state == "queued":
        return "waits for its turn"
    if job.state == "finished" and job.ended is not None:
        return "done"
    if job.state == "stopped" and not job.begun:
        return "taken out of the queue"
    if progress is None:
        return "begins" if job.state == "running" else f"exit code {job.code}" if job.code is not None else ""
    shown = size if progress.unit == "bytes" else "{:,}".format
    words = f"{shown(progress.done)} of {shown(progress.total)}"
    if job.state != "running":
        return words
    rate = "" if progress.rate is None else f", {size(progress.rate)}/s" if progress.unit == "bytes" else ""
    left = "" if progress.left is None else f", {duration(progress.left)} left"
    return words + rate + left


def stop(studio: Studio, asked: Asked) -> Any:
    studio.jobs.stop(asked.path["id"])
    return go(asked("back") or f"/run/{asked.path['id']}", asked)


def resume(studio: Studio, asked: Asked) -> Any:
    job = studio.jobs.get(asked.path["id"])
    if job.over:
        studio.jobs.resume(job.id)
    return go(f"/run/{job.id}", asked)


def remove(studio: Studio, asked: Asked) -> Any:
    with suppress(SourceError):  # gone already: a second click
        studio.jobs.remove(asked.path["id"])
    return go("/run", asked)


def verify(studio: Studio, asked: Asked) -> Any:
    """Queue a look at what was written: its checksums; with `rerun` also the same merge again."""
    out = _made_within(studio, asked("out")) if asked("rerun") else _shown(studio, asked("out"))
    more = ["--rerun"] if asked("rerun") else []
    job = studio.jobs.add(["verify", out, *more], f"verify {out}", {"out": out})
    return go(f"/run/{job.id}", asked)


def check(studio: Studio, asked: Asked) -> Any:
    """Queue a look whether a model works: perplexity beside its parents'."""
    out = _made_within(studio, asked("out"))
    more = ["--json"] if asked("json") else []
    job = studio.jobs.add(["check", out, *more], f"check {out}", {"out": out})
    return go(f"/run/{job.id}", asked)


def _shown(studio: Studio, text: str) -> str:
    if not text.strip():
        raise OutputError("name the folder to look at")
    return studio.places.shown(studio.places.inside(text))


def _made_within(studio: Studio, text: str) -> str:
    """A result as commands name it, whose recipe leads nowhere else: its parents will be opened too."""
    folder = studio.places.home / _shown(studio, text)
    if (folder / MANIFEST).exists():
        for one in studio.places.strangers(read_manifest(folder)["recipe"], folder):
            raise OutsideError(
                f"{text} was made from {one!r}, which is outside the folders that the studio was started with"
            )
    return studio.places.shown(folder)
