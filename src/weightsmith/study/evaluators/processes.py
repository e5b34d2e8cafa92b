"""Evaluators in processes of their own: lm_eval and mteb through a driver in their environment, and any program.

A driver takes its request as JSON on standard input and answers on standard output.  It imports nothing of weightsmith,
so that its environment needs none.  Variables that would let a library look something up are closed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.io import system
from weightsmith.study.evaluators.found import Found, of_examples
from weightsmith.study.evaluators.lines import read_lines
from weightsmith.study.evaluators.specs import LmEval, Mteb, Program
from weightsmith.study.evaluators.subject import Subject

__all__ = ["OFFLINE", "answer", "lm_eval", "mteb", "program"]

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1",
           "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip

_LONGEST = 64 << 20


def lm_eval(subject: Subject, spec: LmEval, python: str) -> Found:
    """One task of lm_eval; metrics without lm_eval's ',none', and a filter's name behind a comma."""
    return _driven("lm_eval", python, subject, spec.seconds, {
        "task": spec.task, "include": spec.include, "shots": spec.shots, "defaults": spec.defaults,
    })  # fmt: skip


def mteb(subject: Subject, spec: Mteb, python: str) -> Found:
    """One task of mteb; every number that it gives for the test split."""
    files = {"test": (spec.file, subject.setting.limit), "train": (spec.train, None)}
    rows = {name: read_lines(Path(file), limit) for name, (file, limit) in files.items() if file is not None}
    return _driven("mteb", python, subject, spec.seconds, {"task": spec.task, "type": spec.type, "rows": rows})


def _driven(kind: str, python: str, subject: Subject, seconds: float, request: Mapping[str, Any]) -> Found:
    setting, where = subject.setting, f"{kind} {request['task']}"
    whole = {**request, "model": str(subject.path().absolute()), "limit": setting.limit, "batch": setting.batch,
             "dtype": setting.dtype, "device": setting.device, "chat": setting.template == "chat"}  # fmt: skip
    if setting.template not in ("plain", "chat"):
        raise RecipeError(f"{kind} has prompts of its own: the template is plain or chat, not a text")
    driver = resources.files("weightsmith.study.evaluators").joinpath("drivers", f"{kind}_driver.py")
    with tempfile.TemporaryDirectory(prefix="weightsmith-bench-") as room, resources.as_file(driver) as script:
        said = _run([python, str(script)], seconds, where, Path(room), json.dumps(whole))
    if not said.strip():
        raise RecipeError(f"{where}: ended without an answer")
    try:
        return answer(json.loads(said), where)
    except ValueError as error:
        raise RecipeError(f"{where}: its answer is not valid JSON ({error})") from None


def program(subject: Subject, spec: Program, task: str) -> Found:
    """The user's program on the model's folder, without a shell; what it prints last counts."""
    where = f"program {spec.command!r}"
    try:
        words = shlex.split(spec.command)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    if not words:
        raise RecipeError("program: the command is empty; name one that prints JSON")
    limit = "" if subject.setting.limit is None else str(subject.setting.limit)
    values = {"{model}": str(subject.path()), "{task}": task, "{limit}": limit}
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    printed = _run([sys.executable if words[0] == "python" else words[0], *words[1:]], spec.seconds, where, None)
    last = printed.strip().split("\n")[-1]
    try:
        return answer(json.loads(last), where)
    except ValueError:
        raise RecipeError(f"{where}: the last line that it prints should be JSON, is {last[:80]!r}") from None


def answer(given: Any, where: str) -> Found:
    """An answer in one of its three forms, strictly read."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        given = {"score": given}
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: gave {type(given).__name__}; expected a number, a score or metrics")
    if "metrics" not in given:
        if "score" not in given:
            raise RecipeError(f"{where}: gave no score and no metrics, but {', '.join(map(str, given)) or 'nothing'}")
        given = {
            "metrics": {"score": given["score"]},
            "errors": {"score": given["stderr"]} if given.get("stderr") is not None else {},
            "examples": {"score": given["examples"]} if given.get("examples") else {},
        }
    parts = {name: given.get(name) or {} for name in ("metrics", "errors", "examples", "notes")}
    if wrong := [name for name, value in parts.items() if not isinstance(value, Mapping)]:
        raise RecipeError(f"{where}: {wrong[0]} should be a mapping")
    errors = {key: value for key, value in parts["errors"].items() if isinstance(value, (int, float))}
    examples = {
        key: [float(one) for one in values]
        for key, values in parts["examples"].items()
        if isinstance(values, list) and values and all(isinstance(one, (int, float)) for one in values)
    }
    for key in list(examples):
        if not all(map(math.isfinite, examples[key])):
            raise RecipeError(f"{where}: the {key} of an example is not a finite number")
        if not _is_mean(parts["metrics"].get(key), examples[key]):  # resampling them would say nothing about it
            del examples[key]
    of_them = of_examples(examples).errors
    return Found(parts["metrics"], {**of_them, **errors}, examples, parts["notes"])


def _is_mean(score: Any, examples: Sequence[float]) -> bool:
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return False
    return math.isclose(score, math.fsum(examples) / len(examples), rel_tol=1e-4, abs_tol=1e-6)


def _run(words: Sequence[str], seconds: float, where: str, room: Path | None, given: str = "") -> str:
    """Run to the end, or stop it and all that it began; returns what it printed."""
    environment = {**os.environ, **OFFLINE}
    if room is not None:  # the environment's own packages, and no others
        environment.pop("PYTHONPATH", None)
    with system.call(tempfile.TemporaryFile) as out, system.call(tempfile.TemporaryFile) as log:
        try:
            child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=out, stderr=log, cwd=room,
                                     env=environment, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise RecipeError(f"{where}: {words[0]}: {error.strerror or error}") from None
        try:
            child.communicate(given.encode(), seconds)
        except subprocess.TimeoutExpired:
            raise RecipeError(f"{where}: stopped after {seconds:g} s; give it more `seconds`, or a `limit`") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode:
            log.seek(0)
            said = log.read()[-4000:].decode(errors="replace").strip().splitlines()
            raise RecipeError(f"{where}: ended with code {child.returncode}" + (f": {said[-1]}" if said else ""))
        out.seek(max(out.seek(0, os.SEEK_END) - _LONGEST, 0))
        text: str = out.read().decode(errors="replace")
        return text
