"""Checkpoints of a training run, and what the trainer logged: folders checkpoint-N and their trainer_state.json."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.read.small import read_json

__all__ = ["STATE", "checkpoints", "logged", "select", "step_of"]

STATE = "trainer_state.json"
_MAX_STATE = 200_000_000  # bytes: an entry per logged step
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: Path) -> dict[int, Path]:
    """Step -> folder of a run's checkpoints, by rising step.  SourceError if there are none."""
    try:
        names = system.call(os.listdir, run)
    except OSError as error:
        raise SourceError(f"{run}: cannot be listed ({error.strerror})") from None
    found = {int(match[1]): run / name for name in names if (match := _NAME.fullmatch(name)) and (run / name).is_dir()}
    if not found:
        raise SourceError(f"{run}: no folders checkpoint-N in it; give the output folder of a training run")
    return dict(sorted(found.items()))


def select(
    found: dict[int, Path], last: int | None = None, every: int | None = None, steps: Sequence[int] | None = None
) -> list[Path]:
    """Some of the checkpoints: those from step a to b, of these every n-th counted from the end, of these the last n.

    SourceError if fewer than two remain: there would be nothing to average.
    """
    chosen = [path for step, path in found.items() if steps is None or steps[0] <= step <= steps[1]]
    chosen = chosen[::-1][:: every or 1][:last][::-1]
    if len(chosen) < 2:
        raise SourceError(
            f"{len(chosen)} of the {len(found)} checkpoints (steps {min(found)} to {max(found)}) selected; "
            "an average needs two"
        )
    return chosen


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, or else in its trainer_state.json."""
    named = _NAME.fullmatch(checkpoint.resolve().name)
    if named:
        return int(named[1])
    path = checkpoint / STATE
    if not path.is_file():
        raise SourceError(f"{checkpoint}: its step is not known: it is not called checkpoint-N and has no {STATE}")
    step = _state(path).get("global_step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise SourceError(f"{path}: global_step is {step!r}, not a step")
    return step


def logged(checkpoint: Path, what: str, since: int | None = None) -> float:
    """The mean of the values `what` ('loss', 'eval_loss') that the trainer logged for a checkpoint.

    since  average the entries after this step and up to the checkpoint's; default: its nearest entry alone

    The nearest entry is the last one up to the checkpoint's step, at most one logging interval before it.
    The log is the checkpoint's own trainer_state.json, or the run's.  Errors (SourceError) name the step.
    """
    step = step_of(checkpoint)
    path = next((p for p in (checkpoint / STATE, checkpoint.resolve().parent / STATE) if p.is_file()), None)
    if path is None:
        raise SourceError(f"{checkpoint}: no {STATE} in it or beside it; give each checkpoint's value instead")
    entries = _entries(path, what)
    before = [(at, value) for at, value in entries if at <= step]
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(entries) if later > earlier]
    interval = max(gaps, default=step)
    if not before or step - before[-1][0] > interval:
        near = f"the nearest before is of step {before[-1][0]}" if before else "and none before"
        raise SourceError(f"{path}: no {what} logged for step {step} ({near}); give each checkpoint's value instead")
    values = [value for at, value in before if since is not None and at > since] or [before[-1][1]]
    found = math.fsum(values) / len(values)
    if not math.isfinite(found):
        raise SourceError(f"{path}: {what} at step {step} is {found}; leave this checkpoint out")
    return found


def _entries(path: Path, what: str) -> list[tuple[int, float]]:
    """(step, value) of the log's entries that have the value, by rising step."""
    history = _state(path).get("log_history")
    if not isinstance(history, list):
        raise SourceError(f"{path}: no log_history in it")
    found: dict[int, float] = {}
    for entry in history:
        if isinstance(entry, dict) and what in entry:
            step, value = entry.get("step"), entry[what]
            if isinstance(step, bool) or not isinstance(step, int) or isinstance(value, bool):
                raise SourceError(f"{path}: an entry of log_history has step {step!r} and {what} {value!r}")
            if not isinstance(value, (int, float)):
                raise SourceError(f"{path}: {what} at step {step} is {value!r}, not a number")
            found[step] = float(value)
    return sorted(found.items())


def _state(path: Path) -> dict[str, Any]:
    state = read_json(path, _MAX_STATE)
    if not isinstance(state, dict):
        raise SourceError(f"{path}: not a JSON object")
    return state
