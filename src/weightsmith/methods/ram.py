"""Add up what only one model changed, average what several did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, number
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ram", "active", "by_sharing"]


@dataclass(frozen=True)
class Ram(Method, name="ram", needs=(BASE,)):
    """Average what several models changed, and keep in full what only one did.

    Result: base + the mean of the changes of those models that changed the entry: |delta_i| > epsilon.
    An entry that one model changed keeps that change in full, instead of a share 1 / n of it.
    """

    paper = "Behavior Knowledge Merge in Reinforced Agentic Models (2026), arXiv:2601.13572; as in mergekit"

    epsilon: float = number(1e-5, "size up to which a change counts as none", low=0)

    def merge(self, site: Site) -> Tensor:
        deltas = site.deltas
        assert site.base is not None
        return site.base + by_sharing(deltas, self.epsilon, (1.0,) * site.count)


def active(deltas: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Who changed an entry, and how many did: bool [n, *block], int64 [*block]."""
    changed = deltas.abs() > epsilon  # below it a change counts as rounding
    return changed, changed.sum(0)


def by_sharing(deltas: Tensor, epsilon: float, alone: tuple[float, ...]) -> Tensor:
    """The mean of the active changes; one that stands alone is multiplied by its model's factor."""
    changed, count = active(deltas, epsilon)
    # Added in recipe order, as everywhere.
    total = torch.zeros_like(deltas[0])
    for delta, mine, factor in zip(deltas, changed, alone, strict=True):
        # A factor of 1 takes no mask: ram itself has no other.
        own = delta if isinstance(factor, float) and factor == 1 else torch.where(count == 1, delta * factor, delta)
        total = total + torch.where(mine, own, 0.0)
    # Where nobody changed it the sum is 0.
    return total / count.clamp(min=1)
