"""Soups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.cli.show import progress_bar, say, show_json, table, warn
from weightsmith.core.errors import RecipeError

if TYPE_CHECKING:
    from weightsmith.core.settings import Settings
    from weightsmith.jobs.soup import FolderSoup
    from weightsmith.recipe.schema import Recipe

__all__ = ["averaged", "greedy", "summary"]


def greedy(
    recipe: Recipe,
    out: Path,
    settings: Settings,
    *,
    command: str | None,
    scores: Path | None,
    size: int | None,
    lower_is_better: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Make a soup that scores choose, and say what it consists of."""
    from weightsmith.jobs.soup import soup
    from weightsmith.study.scores import command as program
    from weightsmith.study.scores import read_scores, remembered

    given = None if scores is None else read_scores(scores)
    measure = None if command is None else program(command)
    made = soup(
        recipe, out, measure, settings, scores=given, size=size, lower_is_better=lower_is_better,
        remember=None if command is None else remembered(out, command, settings.device),
        tell=None if quiet or json else lambda names, score: say(f"  {score:.6g}  {', '.join(names)}"),
    )  # fmt: skip
    summary(made, json=json, quiet=quiet)


def averaged(
    source: Path,
    out: Path,
    kind: str,
    last: int | None,
    decay: float,
    settings: Settings,
    *,
    others: tuple[Any, ...],
    json: bool,
    quiet: bool,
) -> None:
    """Average a run's checkpoints, and say with which weights."""
    from weightsmith.cli.shown.result import summary as result
    from weightsmith.jobs.merge import run
    from weightsmith.jobs.window import window

    if any(other is not None for other in others):
        raise RecipeError("--window weighs by steps; leave out --score-command, --scores and --size")
    recipe = window(source, kind, last=last, decay=decay)
    if not (quiet or json):
        for name, weight in recipe.parameters["weight"].items():
            say(f"  {weight:.6g}  {name}")
    with progress_bar("averaging", quiet=quiet or json) as progress:
        made = run(recipe, out, settings, progress=progress)
    result(made, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')


def summary(made: FolderSoup, *, json: bool, quiet: bool) -> None:
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
