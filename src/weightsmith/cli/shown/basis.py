"""What `align --bases` does and says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.cli.options import chosen
from weightsmith.cli.show import duration, progress_bar, say, show_json, warn
from weightsmith.core.errors import RecipeError

if TYPE_CHECKING:
    from weightsmith.align.towards import Towards

__all__ = ["write_in_basis"]


def write_in_basis(
    moving: Path, to: Path, out: Path, overwrite: bool, more: Mapping[str, object], *, json: bool, quiet: bool
) -> None:
    """more: options of matching, none of which may be given."""
    from weightsmith.align.towards import towards

    if given := [name for name, value in more.items() if value not in (None, False, ())]:
        raise RecipeError(f"--bases finds everything by least squares, layer by layer; leave out {given[0]}")
    with progress_bar("writing", quiet=quiet or json) as progress:
        found = towards(moving, to, out, settings=chosen(overwrite=overwrite, progress=progress))
    _show(found, json=json, quiet=quiet)


def _show(found: Towards, *, json: bool, quiet: bool) -> None:
    """What stood elsewhere in a model, and how far it lay and lies from its reference."""
    result, moved = found.result, found.moved
    if json:
        show_json({
            "out": result.out, "seconds": round(result.seconds, 3), "moved": moved, "residuals": found.residuals,
            "distance": found.distance, "logits": found.agreement, "warnings": result.warnings,
        })  # fmt: skip
        return
    for problem in result.warnings:
        warn(problem)
    if quiet:
        return
    count, of = (sum(column) for column in zip(*moved.values(), strict=True))
    before, after = found.distance
    say(f"{count} of {of} heads and hidden units stood elsewhere; distance from the reference, relative: "
        f"{before:.3g} -> {after:.3g}")  # fmt: skip
    if found.agreement is not None:
        say(f"outputs {found.agreement.words}")
    say(f"wrote {result.out} in {duration(result.seconds)}: a model to merge as any other")
