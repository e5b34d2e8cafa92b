"""Go towards another model by a fixed step at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import at_most
from weightsmith.core.method import BASE, Method, number
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Nearswap"]


@dataclass(frozen=True)
class Nearswap(Method, name="nearswap", needs=(BASE,), checks=(at_most(1),)):
    """Move every entry towards the other model, by a fixed step at most.

    Result: base + delta cut to [-t, t]: entries that are near become the other model's.
    mergekit writes it as w b + (1 - w) a with w = min(t / max(|b - a|, 1e-6), 1), which is the same but for changes
    and t both below 1e-6.
    """

    paper = "NearSwap (alchemonaut, 2024); as in mergekit"

    t: float = number(0.01, "largest change of an entry (try a fraction of the typical |delta|)", low=0, smooth=True)

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        # mergekit interpolates by t / |delta|, cut at 1: entries that changed less than t are taken over, the others
        # move by t.
        return site.base + site.deltas[0].clamp(-self.t, self.t)
