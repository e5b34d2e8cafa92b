"""Keep the largest change of every entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Pass, number
from weightsmith.core.site import Site
from weightsmith.ops.length import AUTO, Lengthened

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Magmax"]


@dataclass(frozen=True)
class Magmax(Lengthened, Method, name="magmax", needs=(BASE,)):
    """Keep the largest change of every entry.

    Result: base + lambda delta, delta of the model that changed the entry most; of +x and -x, +x.
    Meant for tasks learned one after another, each model continuing from the one before (lambda 0.5 there), all
    compared with the first base.
    """

    paper = "MagMax (Marczak et al., ECCV 2024), arXiv:2407.06322"

    lambda_: float | str = number(1.0, "factor of the merged task vector", options=(AUTO,), smooth=True)

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return self.lengths()

    def merge(self, site: Site) -> Tensor:
        deltas = site.deltas
        # Two at a time: no [n, *block] of magnitudes.
        best = deltas[0]
        for delta in deltas[1:]:
            # Of equal magnitudes the positive one: the order of the experts does not matter.
            larger = (delta.abs() > best.abs()) | ((delta.abs() == best.abs()) & (delta > best))
            best = torch.where(larger, delta, best)
        assert site.base is not None
        return site.base + self.scaled(best, site)
