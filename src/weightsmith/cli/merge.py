"""`weightsmith merge`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Plugins, Quiet, RecipeFile, Run, Sweeps, read_variants
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.result import summary, summary_of_all
from weightsmith.cli.words import Parameter
from weightsmith.core.problem import Code, told

__all__ = ["merge"]


def merge(
    recipe: RecipeFile,
    out: Annotated[Path, Parameter(help="Folder, or URL (s3://bucket/out), to write; it appears when complete.")],
    /,
    *,
    set_: Sweeps = (),
    dry_run: Annotated[bool, Parameter(help="Show the plan and stop.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> int:
    """Merge models as a recipe says, into a folder that transformers and others can load."""
    files: list[Path] = []
    variants = read_variants(recipe, set_, plugin, files)
    if dry_run:
        from weightsmith.cli.plan import preview

        return preview(variants, out, settings.but(files=files), json=json)
    from weightsmith.jobs.merge import run
    from weightsmith.observe.consistency import cheap_check

    with progress_bar("merging", quiet=quiet or json) as progress:
        settings = settings.but(files=files, progress=progress)
        if len(variants) > 1:
            from weightsmith.jobs.sweep import run_sweep

            swept = run_sweep(variants, out, settings)
        else:
            result = run(next(iter(variants.values())), out, settings)
    if len(variants) > 1:
        summary_of_all(swept, json=json, quiet=quiet)
        return 0
    result = replace(result, warnings=(*result.warnings, *told(Code.CHECK, cheap_check(result.out))))
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')
    return 0
