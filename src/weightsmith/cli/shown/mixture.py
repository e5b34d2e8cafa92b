"""Mixtures of experts that are about to be built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.cli.show import say, show_json, size, table, warn

if TYPE_CHECKING:
    from weightsmith.experts.calibrate import Calibrated
    from weightsmith.experts.smaller import Smaller
    from weightsmith.moe.draft import Draft

__all__ = ["calibrated", "fewer", "next_of", "preview", "preview_fewer", "sizes"]


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


def fewer(found: Smaller) -> str:
    before, after = (sum(counts[i] for counts in found.counts.values()) for i in (0, 1))
    now, was = (sum(key.nbytes for key in source.keys.values()) for source in (found.source, found.original))
    return (
        f"{found.asked.by}: {after} of {before} experts in {len(found.counts)} layers, {found.chosen} per token; "
        f"{size(now)} (the model has {size(was)})"
    )


def next_of(found: Smaller, out: object) -> str:
    """What to do with the folder that was written."""
    from weightsmith.experts.smaller import CODED, NAME

    if found.asked.by == CODED:
        return f'"weightsmith restore {out} OUT --expert {NAME}" gives a model that transformers loads'
    return f'"weightsmith check {out}" sees whether it works'


def preview_fewer(found: Smaller, json: bool) -> None:
    if json:
        show_json({
            "by": found.asked.by,
            "layers": {
                layer.stack.name: {
                    "experts": layer.grouping.count,
                    "of": layer.stack.count,
                    "labels": list(layer.grouping.labels),
                }
                for layer in found.layers
            },
            "bytes": sum(key.nbytes for key in found.source.keys.values()),
            "model_bytes": sum(key.nbytes for key in found.original.keys.values()),
            "warnings": found.warnings,
        })  # fmt: skip
        return
    rows = []
    for layer in found.layers:
        groups = [layer.grouping.members(number) for number in range(layer.grouping.count)]
        told = " ".join("+".join(map(str, group)) for group in groups)
        rows.append((layer.stack.name, f"{layer.grouping.count} of {layer.stack.count}", told))
    table("Experts", ["layer", "kept", "made of"], rows)
    for text in found.warnings:
        warn(text)
    say(fewer(found))


def calibrated(found: Calibrated, *, json: bool, quiet: bool) -> None:
    """Say what fitting the routers has changed."""
    if json:
        made = {"out": found.result.out, "perplexity": found.perplexity, "errors": found.errors}
        show_json({**made, "tokens": found.tokens, "warnings": found.result.warnings})
        return
    for text in found.result.warnings:
        warn(text)
    if quiet:
        return
    rows = [(name, f"{before:.3%}", f"{after:.3%}") for name, (before, after) in found.errors.items()]
    table("Error of a layer's routed output", ["experts", "before", "after"], rows, right=(1, 2))
    said = [(name, f"{value:.4g}") for name, value in found.perplexity.items()]
    table("Perplexity on text held back", ["model", "perplexity"], said, right=(1,))
    say(f"wrote {found.result.out}: routers fitted on {found.tokens} tokens")
