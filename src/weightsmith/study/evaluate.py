"""Scoring a model on every task: a function of the user's own, or what is built in for Hugging Face folders.

A file named with --evaluator defines

    def scores(model: Path, split: str, **arguments) -> dict[str, float]

`model` is a checkpoint of the study, as the study names it, or a folder that a merge wrote (`model.safetensors`,
and the base's companions); `split` is "validation" or "test"; the arguments are those under `evaluate: function:`.
It returns a score for every task and guard.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from weightsmith.core.errors import RecipeError, SourceError, WeightsmithError, did_you_mean
from weightsmith.io import system
from weightsmith.plugins import line_in, neighbours, run_once
from weightsmith.study.schema import FUNCTION, TASKS, Study

if TYPE_CHECKING:
    from weightsmith.observe.model import LoadedModel

__all__ = ["Scorer", "digest", "function", "measured", "scorer"]

_OPTION = "--evaluator"


class Scorer:
    """Scores models of one study.  `identity` holds all that the scores depend on besides the model."""

    def __init__(
        self, study: Study, score: Callable[[Path, str], Mapping[str, Any]], identity: Any, label: str
    ) -> None:
        self.study, self.score, self.identity, self.label = study, score, identity, label

    def __call__(self, model: Path, split: str) -> dict[str, float]:
        """Task or guard -> score, all finite.

        Raises RecipeError if the function fails or leaves something out.
        """
        found = self.score(model, split)
        if not isinstance(found, Mapping):
            raise RecipeError(f"{self.label}: gives {type(found).__name__}, not a mapping from tasks to scores")
        scores = {}
        for name in self.study.scored:
            value = found.get(name)
            if value is None:
                hint = did_you_mean(name, [str(key) for key in found])
                raise RecipeError(f"{self.label}: gives no score for {name!r}{hint}")
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise RecipeError(
                    f"{self.label}: the score of {model} on {name!r} ({split}) is {value!r}, not a number"
                )
            scores[name] = float(value)
        return scores


def scorer(study: Study, evaluator: Path | None, device: str = "auto") -> Scorer:
    """How a study's models are scored.  Code runs only if the user has named its file.

    Raises RecipeError if there is no such file, or it defines no `scores`.
    """
    kind, arguments = study.evaluate.kind, study.evaluate.arguments
    if kind == FUNCTION:
        if evaluator is None:
            raise RecipeError(
                f"{study.file}: its models are scored by a function; name the python file that defines "
                f"scores(model, split) with {_OPTION} FILE"
            )
        return Scorer(study, function(evaluator, arguments), _identity(evaluator, arguments), f"{_OPTION} {evaluator}")
    if evaluator is not None:
        raise RecipeError(f"{_OPTION} {evaluator}: {study.file} is scored by the built-in {kind}; leave one out")
    if kind == TASKS:
        from weightsmith.study import multitask

        given = multitask.TaskScores(study, Path(arguments["recipe"]), arguments["own"], device)
        return Scorer(study, given, given.identity(digest), kind)

    def score(model: Path, split: str) -> dict[str, float]:
        return measured(kind, model, {name: Path(files[split]) for name, files in arguments.items()}, device)

    contents = {name: {split: digest(Path(file)) for split, file in files.items()} for name, files in arguments.items()}
    return Scorer(study, score, [kind, contents], kind)


# --- the user's function ---------------------------------------------------------------------------


def function(evaluator: Path, arguments: Mapping[str, Any]) -> Callable[[Path, str], Any]:
    """(model, split) -> what scores() of a file gives, which is run now; RecipeError says where it fails."""
    from weightsmith.io.read.shell import no_bars

    module = run_once(evaluator, _OPTION)
    scores = getattr(module, "scores", None)
    if not callable(scores):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise RecipeError(f"{_OPTION} {evaluator}: it defines no scores(model, split){did_you_mean('scores', names)}")

    def score(model: Path, split: str) -> Any:
        try:
            with redirect_stdout(sys.stderr), no_bars():  # what it prints is no part of a report in JSON
                return scores(model, split, **arguments)
        except WeightsmithError:
            raise
        except Exception as error:
            where = f"{_OPTION} {evaluator}{line_in(error, evaluator.expanduser())}"
            raise RecipeError(f"{where}: scores({str(model)!r}, {split!r}): {type(error).__name__}: {error}") from error

    return score


def _identity(evaluator: Path, arguments: Mapping[str, Any]) -> list[Any]:
    """What the scores hang on: the file, those beside it that it has imported, and what it is called with."""
    others = {file.name: digest(file) for file in neighbours(evaluator) if file != evaluator.expanduser().resolve()}
    return [digest(evaluator), arguments, *([others] if others else [])]


def digest(file: Path) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(system.read_file(file.expanduser()))
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from None


# --- built in --------------------------------------------------------------------------------------


def measured(kind: str, model: Path, files: Mapping[str, Path], device: str = "auto") -> dict[str, float]:
    """Task -> score of a model folder by a built-in evaluator, `accuracy` or `bits_per_byte`."""
    from weightsmith.observe.model import load_model

    measure, wanted = {
        "bits_per_byte": (_bits_per_byte, "causal-lm"),
        "accuracy": (_accuracy, "image-classification"),
    }[kind]
    loaded = load_model(model, kind=wanted, device=device)
    return {name: measure(loaded, file) for name, file in files.items()}


def _bits_per_byte(loaded: LoadedModel, file: Path) -> float:
    """Mean bits a causal language model needs per byte of a UTF-8 text."""
    from weightsmith.observe.check import perplexity

    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: not readable as UTF-8 text ({error})") from None
    return perplexity(loaded, text)["bits_per_byte"]


def _accuracy(loaded: LoadedModel, file: Path) -> float:
    """Percent of the labelled images of an .npz file whose class a classifier finds."""
    from weightsmith.study.evaluators.pictures import hits

    found = hits(loaded, file)
    return 100 * sum(found) / len(found)
