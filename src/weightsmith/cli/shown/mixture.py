"""Mixtures of experts that are about to be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.cli.show import say, show_json, size, table, warn

if TYPE_CHECKING:
    from weightsmith.moe.draft import Draft

__all__ = ["preview", "sizes"]


def sizes(draft: Draft) -> str:
    return (
        f"{draft.layout.name}: {draft.facts.experts} experts, {draft.facts.chosen} per token; "
        f"{draft.numel:,} parameters, {draft.active:,} per token; {size(draft.nbytes)} (the base has "
        f"{size(draft.dense_bytes)})"
    )


def preview(draft: Draft, json: bool) -> None:
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
    say(sizes(draft))
