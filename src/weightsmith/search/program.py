"""Running a user's program: without a shell, with a time limit, its messages kept, its children ended with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.core.errors import RecipeError, WeightsmithError
from weightsmith.io import system
from weightsmith.io.disk import writing

__all__ = ["ProgramError", "filled", "run", "words_of"]

GRACE = 5.0
"""Seconds between asking a program to end and ending it."""
_TAIL = 4096  # bytes of the messages in which the last line is looked for


class ProgramError(WeightsmithError):
    """A program failed, took too long, or printed what is not a score."""


def words_of(text: str, what: str) -> list[str]:
    """A command's words; RecipeError where there are none, or no such program."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"{what} {text!r}: {error}") from None
    if not words:
        raise RecipeError(f"{what} is empty; name a program that prints the scores of a model folder as JSON")
    if "{" not in words[0] and shutil.which(words[0]) is None:
        raise RecipeError(f"{what} {text!r}: no program {words[0]!r} is found")
    return words


def filled(words: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """The words with `{name}` replaced; `{}` is the model, which is put at the end where nothing stands for it."""
    made = []
    for word in words:
        for name, value in {**values, "": values["model"]}.items():
            word = word.replace(f"{{{name}}}", value)
        made.append(word)
    placed = any(mark in word for word in words for mark in ("{}", "{model}"))
    return made if placed else [*made, values["model"]]


def run(words: Sequence[str], timeout: float, messages: Path, environment: Mapping[str, str] | None = None) -> str:
    """What the program prints; what it says on stderr goes to the file `messages`.

    Raises ProgramError if it cannot be run, fails, or is not done in time; all it has started is then ended.
    """
    with writing(messages):
        system.call(messages.parent.mkdir, parents=True, exist_ok=True)
        stderr = system.call(messages.open, "wb")
    with stderr:
        try:
            child = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            raise ProgramError(f"{words[0]}: {error.strerror or error}") from None
        try:
            printed, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise ProgramError(
                f"{words[0]}: not done after {timeout:g} s, and ended; see {messages}, or raise timeout"
            ) from None
        finally:
            _end(child)
    if child.returncode:
        last = _last_line(messages)
        raise ProgramError(f"{words[0]}: ended with code {child.returncode}{last}; see {messages}")
    return printed


def _end(child: subprocess.Popen[str]) -> None:
    """End a program and all that it has started, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)  # the session it leads: it ends whoever it left behind, too
        if child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GRACE)
    if child.stdout is not None:  # of one that was not waited for to its end
        child.stdout.close()


def _last_line(messages: Path) -> str:
    """': ' and the last line of a file, '' if it is empty."""
    try:
        lines = system.read_file(messages)[-_TAIL:].decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1].strip()[:200]}" if lines else ""
