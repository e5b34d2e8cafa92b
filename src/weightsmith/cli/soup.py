"""`weightsmith soup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Plugins, Quiet, RecipeFile, Run, Sets, read_recipe
from weightsmith.cli.shown.soup import averaged, greedy
from weightsmith.cli.words import Parameter

__all__ = ["soup"]

_WINDOW = (
    "Average a run's checkpoints by their steps: uniform, linear, cosine, minus-sqrt or ema.  RECIPE may be the folder "
    "that holds them."
)


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
    window: Annotated[str | None, Parameter(help=_WINDOW)] = None,
    last: Annotated[int | None, Parameter(help="With --window: the last so many checkpoints only.")] = None,
    decay: Annotated[float, Parameter(help="With --window ema.", show_default=True)] = 0.9,
    lower_is_better: Annotated[bool, Parameter(help="Scores are losses.")] = False,
    set_: Sets = (),
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> int:
    """Merge models that are better together: the greedy soup, the best few, all, or a run's checkpoints (--window).

    The greedy soup goes through the models from the best one, and keeps each with which the merge scores no worse.
    Scores are kept in OUT.scores.jsonl, so that an interrupted soup goes on where it was.
    """
    if window is not None:
        averaged(
            recipe, out, window, last, decay, settings, others=(score_command, scores, size), json=json, quiet=quiet
        )
        return 0
    files: list[Path] = []
    greedy(read_recipe(recipe, set_, plugin, files), out, settings.but(files=tuple(files)), command=score_command,
           scores=scores, size=size, lower_is_better=lower_is_better, json=json, quiet=quiet)  # fmt: skip
    return 0
