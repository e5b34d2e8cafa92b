"""What a candidate's score is, and how it is found: by a program, a python file, or what is built in."""

from __future__ import annotations

import inspect
import json
import math
import numbers
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, WeightsmithError, did_you_mean
from weightsmith.plugins import line_in, neighbours, run_once
from weightsmith.search.program import ProgramError, filled, run, words_of
from weightsmith.search.schema import LmEval, ScoreSpec, SearchFile
from weightsmith.study.evaluate import digest, measured

__all__ = ["SPLITS", "Scored", "Scorer", "printed_json", "read", "scorer"]

SPLITS = ("search", "report")


@dataclass(frozen=True)
class Scored:
    """Scores of one model.

    values  score -> its value
    items   score -> the value of each item, where the evaluator tells them
    errors  score -> standard error of the value, where it is known
    """

    values: Mapping[str, float]
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "values": dict(self.values),
            "items": {k: list(v) for k, v in self.items.items()},
            "errors": dict(self.errors),
        }


def read(found: Any, names: Sequence[str], label: str) -> Scored:
    """Read what an evaluator gave: a number, or score -> a number, a list of a number per item, or {mean, stderr}.

    Raises ProgramError for a score that is missing, is no number, or is NaN or infinite.
    """
    if not isinstance(found, Mapping):
        if len(names) > 1:
            raise ProgramError(f"{label}: gives {_short(found)}, not a mapping with {', '.join(names)}")
        found = {names[0]: found}
    values, items, errors = {}, {}, {}
    for name in names:
        if name not in found:
            hint = did_you_mean(name, [str(key) for key in found])
            raise ProgramError(f"{label}: gives no score {name!r}{hint}")
        value = found[name]
        if isinstance(value, Mapping) and "mean" in value:
            value, error = value["mean"], value.get("stderr")
            if error is not None:
                errors[name] = _number(error, f"{label}: the error of {name}")
        if isinstance(value, (list, tuple)):
            if not value:
                raise ProgramError(f"{label}: {name} has no item")
            items[name] = [_number(one, f"{label}: an item of {name}") for one in value]
            value = statistics.fmean(items[name])
            if len(items[name]) > 1:
                errors[name] = statistics.stdev(items[name]) / math.sqrt(len(items[name]))
        values[name] = _number(value, f"{label}: {name}")
    return Scored(values, items, errors)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ProgramError(f"{what} is {_short(value)}, not a finite number")
    return float(value)


def _short(value: Any) -> str:
    return repr(value)[:80]


@dataclass(frozen=True)
class Scorer:
    """Scores models.

    score      (model, split, items or None for all, file for messages) -> what `read` reads
    identity   all that scores depend on beside the model, as JSON holds it
    in_memory  the model is handed over as tensors by name, else as a folder
    halves     it can score on the first few items
    apart      it runs in processes that end with it: nobody looks at the model's files afterwards
    """

    names: Sequence[str]
    score: Callable[[Any, str, int | None, Path], Any]
    identity: Any
    label: str
    in_memory: bool = False
    halves: bool = True
    apart: bool = False

    def __call__(self, model: Any, split: str, items: int | None, messages: Path) -> Scored:
        """The scores; WeightsmithError says why there are none."""
        return read(self.score(model, split, items, messages), self.names, self.label)


def scorer(file: SearchFile, device: str = "auto") -> Scorer:
    """How a search's candidates are scored; RecipeError where that cannot be."""
    spec, names = file.score, list(file.aims)
    made = {"command": _program, "file": _function, "lm_eval": _harness}.get(spec.kind)
    return made(spec, names) if made is not None else _built_in(spec, names, device)


# --- a program -------------------------------------------------------------------------------------


def _program(spec: ScoreSpec, names: Sequence[str]) -> Scorer:
    assert spec.command is not None
    assert spec.data is not None
    words = words_of(spec.command, "score.command")
    if not any("{data}" in word for word in words):
        raise RecipeError(
            "score.command has no {data}: it would score both splits on the same data; "
            "write it where the program takes the file"
        )
    files = {"search": spec.data.search, "report": spec.data.report}

    def score(model: Any, split: str, items: int | None, messages: Path) -> Any:
        values = {"model": str(model), "data": files[split], "items": "" if items is None else str(items)}
        return _printed(partial(run, filled(words, values), spec.timeout, messages), spec, spec.command)

    read_too = {word: digest(Path(word)) for word in words if Path(word).is_file()}
    identity = ["command", words, read_too, {split: _contents(path) for split, path in files.items()}]
    halves = any("{items}" in word for word in words)
    return Scorer(names, score, identity, f"score.command {words[0]}", halves=halves, apart=True)


def _printed(run_it: Callable[[], str], spec: ScoreSpec, label: Any) -> Any:
    """The JSON that a program prints last, after as many attempts as are allowed."""
    for attempt in range(spec.retries + 1):
        try:
            return printed_json(run_it(), f"score.command {label}")
        except ProgramError:
            if attempt == spec.retries:
                raise
    raise AssertionError


def printed_json(printed: str, label: Any) -> Any:
    """The JSON in the last line that a program prints, or in all of it; ProgramError where there is none."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    for text in (lines[-1] if lines else "", printed):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            continue
    last = repr((lines or [""])[-1][:80])
    raise ProgramError(f"{label}: prints no JSON; its last line should be a number or a mapping, is {last}")


def _contents(path: str) -> Any:
    """What tells data from other data: a file's hash, of a folder each file's; of a task's name the name."""
    place = Path(path)
    if place.is_file():
        return digest(place)
    if place.is_dir():
        return {str(p.relative_to(place)): digest(p) for p in sorted(place.rglob("*")) if p.is_file()}
    return path


# --- a python file ---------------------------------------------------------------------------------


def _function(spec: ScoreSpec, names: Sequence[str]) -> Scorer:
    assert spec.file is not None
    assert spec.data is not None
    file = Path(spec.file)
    module = run_once(file, "score.file")
    functions = {name: getattr(module, name, None) for name in ("scores", "scores_of_tensors")}
    given = [name for name, function in functions.items() if callable(function)]
    if len(given) != 1:
        raise RecipeError(
            f"score.file {file}: should define scores(model, data), for a folder, or "
            f"scores_of_tensors(tensors, data); it has {' and '.join(given) or 'neither'}"
        )
    function: Any = functions[given[0]]
    files = {"search": spec.data.search, "report": spec.data.report}
    halves = "items" in inspect.signature(function).parameters

    def score(model: Any, split: str, items: int | None, messages: Path) -> Any:
        more = {"items": items} if halves else {}
        try:
            return function(model, files[split], **more, **spec.arguments)
        except WeightsmithError:
            raise
        except Exception as error:
            where = f"score.file {file}{line_in(error, file)}"
            raise ProgramError(f"{where}: {type(error).__name__}: {error}") from error

    others = {other.name: digest(other) for other in neighbours(file)}
    identity = ["file", given[0], digest(file), others, spec.arguments, {s: _contents(p) for s, p in files.items()}]
    return Scorer(names, score, identity, f"score.file {file.name}", given[0] == "scores_of_tensors", halves)


# --- built in --------------------------------------------------------------------------------------


def _built_in(spec: ScoreSpec, names: Sequence[str], device: str) -> Scorer:
    kind, tasks = spec.kind, spec.tasks
    _refuse_unknown(names, tasks)

    def score(model: Any, split: str, items: int | None, messages: Path) -> Any:
        return measured(kind, model, {name: Path(getattr(tasks[name], split)) for name in names}, device)

    identity = [
        kind,
        {name: {split: _contents(getattr(one, split)) for split in SPLITS} for name, one in tasks.items()},
    ]
    return Scorer(names, score, identity, kind, halves=False)


def _refuse_unknown(names: Sequence[str], tasks: Mapping[str, Any]) -> None:
    for name in names:
        if name not in tasks:
            raise RecipeError(f"goals: no data for {name!r} under score{did_you_mean(name, tasks)}")


# --- lm-evaluation-harness -------------------------------------------------------------------------


def _harness(spec: ScoreSpec, names: Sequence[str]) -> Scorer:
    from weightsmith.search import harness

    asked = spec.lm_eval
    assert asked is not None
    _refuse_unknown(names, asked.tasks)
    python = asked.python or sys.executable
    if not harness.there(python):
        raise RecipeError(
            f"score.lm_eval: {python} has no lm_eval; install it (pip install lm-eval), or name a python that has it: "
            "lm_eval: {python: /path/to/python}"
        )

    def score(model: Any, split: str, items: int | None, messages: Path) -> Any:
        wanted = {name: getattr(asked.tasks[name], split) for name in names}
        metrics = {task: _metric(asked, name) for name, task in wanted.items()}
        limit = items if items is not None else asked.limit
        words = harness.command(python, model, metrics, asked, limit)
        found = _printed(partial(run, words, spec.timeout, messages, harness.OFFLINE), spec, "lm_eval")
        return harness.picked(found, wanted, metrics)

    folder = None if asked.include is None else _contents(asked.include)
    identity = ["lm_eval", asked.model_dump(mode="json"), folder]
    return Scorer(names, score, identity, "lm_eval", apart=True)


def _metric(asked: LmEval, name: str) -> str:
    return asked.metric if isinstance(asked.metric, str) else asked.metric.get(name, "acc,none")
