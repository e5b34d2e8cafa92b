"""`weightsmith moe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from weightsmith.cli.merge import summary
from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run, Sets
from weightsmith.cli.show import progress_bar, say, show_json, size, table, warn
from weightsmith.cli.words import Parameter

if TYPE_CHECKING:
    from weightsmith.moe.draft import Draft

__all__ = ["moe"]


def moe(
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
    from weightsmith.moe.build import build, prepared_draft
    from weightsmith.moe.recipe import load

    made = load(recipe, set_)
    draft = prepared_draft(made)
    if dry_run:
        _preview(draft, json)
        return
    if not json and not quiet:
        say(_sizes(draft))
    with progress_bar("building", quiet=quiet or json) as progress:
        result = build(draft, out, settings, drift=not skip_drift, files=(recipe,), progress=progress)
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')


def _sizes(draft: Draft) -> str:
    return (
        f"{draft.layout.name}: {draft.facts.experts} experts, {draft.facts.chosen} per token; "
        f"{draft.numel:,} parameters, {draft.active:,} per token; {size(draft.nbytes)} (the base has "
        f"{size(draft.dense_bytes)})"
    )


def _preview(draft: Draft, json: bool) -> None:
    recipe = draft.recipe
    if json:
        show_json({
            "architecture": draft.layout.class_name,
            "experts": list(recipe.experts),
            "shared": list(recipe.shared),
            "experts_per_token": draft.facts.chosen,
            "parameters": draft.numel,
            "active_parameters": draft.active,
            "bytes": draft.nbytes,
            "base_bytes": draft.dense_bytes,
            "warnings": draft.warnings,
        })  # fmt: skip
        return
    rows = [
        (name, "shared" if name in recipe.shared else "expert", expert.model, len(expert.prompts), len(expert.avoid))
        for name, expert in {**recipe.experts, **recipe.shared}.items()
    ]
    table("Experts", ["name", "role", "model", "prompts", "avoid"], rows, right=(3, 4))
    for text in draft.warnings:
        warn(text)
    say(_sizes(draft))
