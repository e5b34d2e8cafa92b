"""What `find` reads from its options, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightsmith.cli.show import say, show_json, table, warn
from weightsmith.core.errors import RecipeError

if TYPE_CHECKING:
    from weightsmith.vsa.search import Found

__all__ = ["show", "weights_of"]


def weights_of(words: Sequence[str]) -> dict[str, float]:
    """'models.*=0.2' is a weight for all fields of that glob."""
    weights: dict[str, float] = {}
    for word in words:
        glob, _, number = word.rpartition("=")
        try:
            weights[glob] = float(number)
        except ValueError:
            glob = ""
        if not glob:
            raise RecipeError(f"--weight {word!r} is not GLOB=WEIGHT, as models.*=0.2")
    return weights


def _probed(found: Found, name: str, probe: str | None) -> list[str]:
    return [str(found.probed[name][0]) if name in found.probed else "-"] if probe else []


def show(found: Found, warnings: Sequence[str], probe: str | None, *, json: bool, quiet: bool) -> None:
    """The hits, and what they have to stand out from."""
    if json:
        show_json({**vars(found), "warnings": warnings})
        return
    for text in warnings:
        warn(text)
    rows = [(f"{h.cosine:.3f}", h.name, *_probed(found, h.name, probe)) for h in found.hits]
    table(f"nearest of {found.total}", ["cosine", "name", *([probe] if probe else [])], rows, (0,))
    if quiet:
        return
    say(
        f"by chance the best of {found.total} unlike ones has about {found.noise.chance:.3f} (predicted); "
        f"the spread of all is {found.spread:.3f} (measured; of unlike ones {found.noise.spread:.3f} is predicted)"
    )
    if not found.noise.reliable:
        say("fields of this query may drown in that: name fewer, or take a larger --dim")
