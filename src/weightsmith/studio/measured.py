"""What jobs have measured of models: perplexities, scores of the user's evaluator, answers to prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.read.small import read_json
from weightsmith.studio.jobs import Job

__all__ = ["Measured", "Prompted", "check_words", "measured", "prompted"]

_LIMIT = 50_000_000
_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """What is known of a model.

    figures  name -> value: perplexity, bits per byte, and those of the user's evaluator
    note     why there are none
    """

    figures: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Prompted:
    """A prompt, and model -> its answer; `notes` say why one has none."""

    prompt: str
    answers: Mapping[str, str]
    notes: Sequence[str]
    job: Job


def check_words(models: Sequence[str], prompt: str, chat: bool, evaluator: str) -> list[str]:
    """The command that measures some models in one go, one in memory at a time."""
    first, *others = models
    words = ["check", first, "--json", *(f"--beside={one}" for one in others)]
    words += [f"--prompt={prompt}", f"--tokens={_TOKENS}", *(["--chat"] if chat else [])] if prompt else []
    return [*words, *([f"--evaluator={evaluator}"] if evaluator else [])]


def measured(jobs: Iterable[Job]) -> Mapping[str, Measured]:
    """Model -> what was measured of it last; `jobs` begin with the newest."""
    found: dict[str, Measured] = {}
    for job, told in _told(jobs):
        for model, key in _models(job):
            own = {
                name.replace("_", " "): told["models"].get(key, {}).get(name)
                for name in ("perplexity", "bits_per_byte")
            }
            own |= told.get("scores", {}).get(key, {})
            known = {name: float(value) for name, value in own.items() if isinstance(value, (int, float))}
            before = found.get(model, Measured({}))
            said = [*told["problems"], *told["notes"], *filter(None, [told.get("missing", {}).get(key)])]
            note = before.note or ("" if known or before.figures else "; ".join(map(str, said)))
            found[model] = Measured({**known, **before.figures}, note)
    return found


def prompted(jobs: Iterable[Job], models: Sequence[str]) -> list[Prompted]:
    """What these models were asked together, the newest first."""
    found = []
    for job, told in _told(jobs):
        names = dict(_models(job))
        prompt = job.about.get("prompt")
        if isinstance(prompt, str) and prompt and set(models) <= set(names):
            answers = told.get("answers", {})
            given = {name: str(answers[names[name]]) for name in models if names[name] in answers}
            found.append(Prompted(prompt, given, [*map(str, [*told["problems"], *told["notes"]])], job))
    return found


def _models(job: Job) -> Iterator[tuple[str, str]]:
    """(model, what the report calls it) of a check."""
    out, beside = str(job.about.get("out", "")), job.about.get("beside")
    yield out, out if beside else "merged"
    yield from ((str(one), str(one)) for one in (beside if isinstance(beside, list) else ()))


def _told(jobs: Iterable[Job]) -> Iterator[tuple[Job, Mapping[str, Any]]]:
    """The reports of `weightsmith check --json`; of one that failed, what it has said."""
    for job in jobs:
        if job.verb != "check" or "--json" not in job.words or not job.over or job.code not in (0, 2):
            continue
        try:
            file = job.folder / "out"
            told = _read(file, system.call(file.stat).st_mtime_ns)
        except (SourceError, OSError):
            last = (job.log().strip().splitlines() or ["it could not be checked"])[-1]
            told = {"models": {}, "problems": [last.removeprefix("error: ")], "notes": []}
        yield job, told


@lru_cache(maxsize=128)
def _read(file: Path, changed: int) -> Mapping[str, Any]:
    """A report; SourceError where it is none."""
    told = read_json(file, _LIMIT)
    kinds = {"models": dict, "problems": list, "notes": list, "scores": dict, "answers": dict, "missing": dict}
    good = isinstance(told, dict) and {"models", "problems", "notes"} <= told.keys()
    good = good and all(isinstance(told.get(key, kind()), kind) for key, kind in kinds.items())
    inner = ("models", "scores")
    if not good or not all(isinstance(one, dict) for key in inner for one in told.get(key, {}).values()):
        raise SourceError(f'{file}: not what "weightsmith check --json" prints')
    return {key: kind() for key, kind in kinds.items()} | dict(told)
