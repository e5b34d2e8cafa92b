"""Adapters that were written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.cli.show import duration, say, show_json, size, table, warn
from weightsmith.core.errors import some

if TYPE_CHECKING:
    from weightsmith.lora import Written

__all__ = ["show"]


def show(result: Written, *, json: bool, quiet: bool) -> None:
    if json:
        show_json(result)
        return
    for text in result.warnings:
        warn(text)
    if quiet:
        return
    if len(set(result.weights.values())) > 1:
        table("weights", ("adapter", "weight"), [(n, f"{w:.4g}") for n, w in result.weights.items()], right=(1,))
    worst = sorted(result.modules, key=lambda module: -module.error)[:10]
    rows = [(m.name, m.rank, f"{m.energy:.2%}", f"{m.error:.2%}") for m in worst]
    if result.worst >= 1e-3:
        table("modules with the largest errors", ("module", "rank", "energy kept", "error"), rows, right=(1, 2, 3))
    say(
        f"wrote {result.out}: {len(result.modules)} modules of rank up to {result.rank}, {size(result.nbytes)}, "
        f"{duration(result.seconds)}; largest error of a module {result.worst:.2g}"
    )
    if result.sizes:
        largest = sorted(result.sizes.items(), key=lambda item: -item[1])
        shown = [f"{name.removeprefix('base_model.model.')} ({size(nbytes)})" for name, nbytes in largest]
        say(f"kept in full, {size(sum(result.sizes.values()))}: {some(shown, 5)}")
    if result.tried:
        say(result.tried)
    say(f'next: peft.PeftModel.from_pretrained(model, "{result.out}")')
