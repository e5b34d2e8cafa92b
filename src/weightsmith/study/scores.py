"""Scores from elsewhere: a file of them, or a program of the user's, remembered between runs."""

from __future__ import annotations

import json
import math
import numbers
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.io import system
from weightsmith.study.cache import Ledger, engine, fingerprint

__all__ = ["command", "read_scores", "remembered"]


def read_scores(file: Path) -> dict[str, float]:
    """The scores of `--scores`: {model: score}."""
    try:
        found = json.loads(system.read_file(file))
    except OSError as error:
        raise RecipeError(f"--scores {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise RecipeError(f"--scores {file}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise RecipeError(f'--scores {file}: should be a mapping, as {{"math": 0.71, "code": 0.69}}')
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RecipeError(f"--scores {file}: the score of {name!r} is {value!r}, not a number")
    return {name: float(value) for name, value in found.items()}


def command(text: str) -> Callable[[Path], float]:
    """What runs the user's program on a folder, without a shell, and reads the number it prints last."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"--score-command {text!r}: {error}") from None
    if not words:
        raise RecipeError("--score-command is empty; name a program that prints the score of a model folder")

    def score(folder: Path) -> float:
        placed = [word.replace("{}", str(folder)) for word in words]
        command = placed if placed != words else [*words, str(folder)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace", check=False)
        except OSError as error:
            raise RecipeError(f"--score-command {text!r}: {error.strerror or error}") from None
        if done.returncode:
            raise RecipeError(f"--score-command {text!r}: ended with code {done.returncode} on {folder}")
        last = (done.stdout.strip().splitlines() or [""])[-1].strip()
        try:
            return float(last)
        except ValueError:
            raise RecipeError(
                f"--score-command {text!r}: the last line it prints should be a number, is {last[:80]!r}"
            ) from None

    return score


def remembered(out: Path, command: str, device: str) -> Callable[[Any, Callable[[], float]], float]:
    """Scores of earlier runs of the same command on the same merges."""
    ledger = Ledger(out.with_name(f"{out.name}.scores.jsonl"))

    def remember(told: Any, measure: Callable[[], float]) -> float:
        key = fingerprint("soup", engine(), command, device, told)
        return float(ledger.get(key, lambda: {"score": measure()})["score"])

    return remember
