"""`weightsmith moe RECIPE OUT`, or `weightsmith moe build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run, Sets
from weightsmith.cli.show import progress_bar, say
from weightsmith.cli.shown.result import summary
from weightsmith.cli.words import Parameter

__all__ = ["build"]


def build(
    recipe: Annotated[Path, Parameter(help="Recipe of the mixture, YAML or JSON; mergekit-moe's configs too.")],
    out: Out,
    /,
    *,
    set_: Sets = (),
    dry_run: Annotated[bool, Parameter(help="Show what would be written, and stop.")] = False,
    skip_drift: Annotated[bool, Parameter(help="Do not measure what the experts learned outside their MLPs.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a mixture of experts: MLPs of several dense models, everything else of one, routers from prompts."""
    from weightsmith.cli.shown.mixture import preview, sizes
    from weightsmith.moe.build import build as run
    from weightsmith.moe.build import prepared_draft
    from weightsmith.moe.recipe import load

    made = load(recipe, set_)
    draft = prepared_draft(made)
    if dry_run:
        preview(draft, json)
        return
    if not json and not quiet:
        say(sizes(draft))
    with progress_bar("building", quiet=quiet or json) as progress:
        result = run(draft, out, settings, drift=not skip_drift, files=(recipe,), progress=progress)
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')
