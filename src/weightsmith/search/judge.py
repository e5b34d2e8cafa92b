"""Scores of any model by the user's own file or program, as `bench` and `search` run it."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.search.program import filled, run, words_of
from weightsmith.search.score import printed_json, read
from weightsmith.study.evaluate import function

__all__ = ["absolute", "judge"]

_OPTION = "--evaluator"
_SECONDS = 24 * 3600.0


def judge(given: str) -> Callable[[Path], Mapping[str, float]]:
    """Model folder -> scores, by what a user has named.

    given  a Python file that defines scores(model, split), asked for the split "test"; or a command, with {model} where
           the folder goes (else it is put at the end), whose last printed line is a number or a mapping, as JSON
    Raises RecipeError if there is no such file or program; calls raise WeightsmithError for what are no scores.
    """
    if _python(given):
        score: Callable[[Path], Any] = _of_file(Path(given))
    else:
        score = _of_program(words_of(given, _OPTION), given)

    def scores(model: Path) -> Mapping[str, float]:
        found = score(model)
        names = list(map(str, found)) if isinstance(found, Mapping) else ["score"]
        if not names:
            raise RecipeError(f"{_OPTION} {given}: gives no score")
        return read(found, names, f"{_OPTION} {given}").values

    return scores


def _python(given: str) -> bool:
    return given.endswith(".py") and (" " not in given or Path(given).expanduser().is_file())


def _of_file(file: Path) -> Callable[[Path], Any]:
    if not file.expanduser().is_file():
        raise RecipeError(f"{_OPTION} {file}: no such file")
    score = function(file, {})
    return lambda model: score(model, "test")


def _of_program(words: list[str], given: str) -> Callable[[Path], Any]:
    def score(model: Path) -> Any:
        with tempfile.TemporaryDirectory(prefix="weightsmith-check-") as room:
            said = run(filled(words, {"model": str(model)}), _SECONDS, Path(room) / "messages")
        return printed_json(said, f"{_OPTION} {given}")

    return score


def absolute(given: str) -> str:
    """What was named, so that it means the same in another working directory; RecipeError where it is not there."""

    def placed(word: str) -> str:
        path = Path(word).expanduser()
        return str(path.resolve()) if word and path.is_file() else word

    if not _python(given):
        return shlex.join(map(placed, words_of(given, _OPTION)))
    if not Path(given).expanduser().is_file():
        raise RecipeError(f"{_OPTION} {given}: no such file")
    return placed(given)
