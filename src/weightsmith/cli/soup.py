"""`weightsmith soup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Plugins, Quiet, RecipeFile, Run, Sets, read_recipe
from weightsmith.cli.show import say
from weightsmith.cli.shown.soup import summary
from weightsmith.cli.words import Parameter

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
    from weightsmith.jobs.soup import soup as run_soup
    from weightsmith.study.scores import command, read_scores, remembered

    given = None if scores is None else read_scores(scores)
    measure = None if score_command is None else command(score_command)
    silent = quiet or json
    made = run_soup(
        read, out, measure, settings, scores=given, size=size, lower_is_better=lower_is_better,
        remember=None if score_command is None else remembered(out, score_command, settings.device),
        tell=None if silent else lambda names, score: say(f"  {score:.6g}  {', '.join(names)}"),
        files=files,
    )  # fmt: skip
    summary(made, json=json, quiet=quiet)
    return 0
