"""`weightsmith soup`."""

from __future__ import annotations

import math
import numbers
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from weightsmith.cli.options import DEFAULTS, Json, Out, Plugins, Quiet, RecipeFile, Run, Sets, read_recipe
from weightsmith.cli.show import say, show_json, table, warn
from weightsmith.cli.words import Parameter

if TYPE_CHECKING:
    from weightsmith.jobs.soup import FolderSoup

__all__ = ["soup"]


def soup(
    recipe: RecipeFile,
    out: Out,
    /,
    *,
    score_command: Annotated[
        str | None,
        Parameter(help="Greedy soup: a program that prints the score of the model folder put for {}, or at its end."),
    ] = None,
    scores: Annotated[
        Path | None, Parameter(help="JSON file with the score of each model by itself, as {math: 0.71, code: 0.69}.")
    ] = None,
    size: Annotated[int | None, Parameter(help="Merge the SIZE best by --scores instead.")] = None,
    lower_is_better: Annotated[bool, Parameter(help="Scores are losses.")] = False,
    set_: Sets = (),
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> int:
    """Merge those models of a recipe that are better together: the greedy soup, the best few, or all of them.

    The greedy soup goes through the models from the best one, and keeps each with which the merge scores no worse.
    Scores are kept in OUT.scores.jsonl, so that an interrupted soup goes on where it was.
    """
    files: list[Path] = []
    read = read_recipe(recipe, set_, plugin, files)
    given = None if scores is None else _read_scores(scores)
    measure = None if score_command is None else _command(score_command)
    from weightsmith.jobs.soup import soup as run_soup

    silent = quiet or json
    made = run_soup(
        read,
        out,
        measure,
        settings,
        scores=given,
        size=size,
        lower_is_better=lower_is_better,
        remember=None if score_command is None else _ledger(out, score_command, settings.device),
        tell=None if silent else lambda names, score: say(f"  {score:.6g}  {', '.join(names)}"),
        files=files,
    )
    _summary(made, json=json, quiet=quiet)
    return 0


def _summary(made: FolderSoup, *, json: bool, quiet: bool) -> None:
    if json:
        trials = [{"models": names, "score": score, "kept": kept} for names, score, kept in made.trials]
        show_json({
            "out": made.result.out, "models": made.members, "score": made.score, "trials": trials,
            "warnings": made.result.warnings,
        })  # fmt: skip
        return
    for text in made.result.warnings:
        warn(text)
    if quiet:
        return
    rows = [(f"{score:.6g}", names[-1], "kept" if kept else "left out") for names, score, kept in made.trials]
    table("Greedy soup", ("score with it", "model", ""), rows, right=(0,))
    reached = "" if made.score is None else f", score {made.score:.6g}"
    say(f"wrote {made.result.out}: {len(made.members)} models, {', '.join(made.members)}{reached}")
    say(f'next: "weightsmith check {made.result.out}" sees whether it works')


def _read_scores(file: Path) -> dict[str, float]:
    import json as codec

    from weightsmith.core.errors import RecipeError
    from weightsmith.io import system

    try:
        found = codec.loads(system.read_file(file))
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


def _command(text: str) -> Callable[[Path], float]:
    """What runs the user's program on a folder, without a shell, and reads the number it prints last."""
    from weightsmith.core.errors import RecipeError

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


def _ledger(out: Path, command: str, device: str) -> Callable[[Any, Callable[[], float]], float]:
    """Scores of earlier runs of the same command on the same merges."""
    from weightsmith.study.cache import Ledger, engine, fingerprint

    ledger = Ledger(out.with_name(f"{out.name}.scores.jsonl"))

    def remember(told: Any, measure: Callable[[], float]) -> float:
        key = fingerprint("soup", engine(), command, device, told)
        return float(ledger.get(key, lambda: {"score": measure()})["score"])

    return remember
