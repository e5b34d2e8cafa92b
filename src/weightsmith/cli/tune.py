"""`weightsmith tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Quiet, Run, Sets
from weightsmith.cli.show import progress_bar, say, show_json
from weightsmith.cli.words import Parameter

__all__ = ["tune"]


def tune(
    tuning: Annotated[Path | None, Parameter(help="What to learn, YAML or JSON (TUNE.yaml).")] = None,
    out: Annotated[Path | None, Parameter(help="Folder of the results.")] = None,
    /,
    *,
    set_: Sets = (),
    steps: Annotated[int | None, Parameter(help="Steps, in place of the file's.")] = None,
    dry_run: Annotated[bool, Parameter(help="Read everything, predict the memory, and stop.")] = False,
    list_: Annotated[bool, Parameter(name="--list", help="List presets and objectives.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn numbers of a recipe from a handful of inputs; OUT/recipe.yaml is the recipe that has them."""
    from weightsmith.cli.process import for_learning
    from weightsmith.cli.shown.tuning import listing, prediction, result
    from weightsmith.core.errors import RecipeError

    if list_:
        listing(json)
        return
    if tuning is None or (out is None and not dry_run):
        raise RecipeError('tune takes a file and a folder: "weightsmith tune TUNE.yaml OUT"; --list shows the presets')
    from weightsmith.tune.job import job
    from weightsmith.tune.schema import load

    for_learning()
    sets = (*set_, f"descent.steps={steps}") if steps is not None else set_
    work = job(load(tuning, sets), settings)
    if dry_run or settings.memory is not None:
        prediction(work.predicted(), settings.memory, show=dry_run, json=json)
    if dry_run or out is None:
        return
    with progress_bar("tuning", quiet=quiet or json, nbytes=False) as progress:
        made = work.run(out, settings, None if progress is None else lambda done, steps, _: progress(done, steps))
    if json:
        show_json(result(made))
    elif not quiet:
        for line in result(made)["said"]:
            say(line)
        say(f'next: "weightsmith merge {out / "recipe.yaml"} MERGED"')
