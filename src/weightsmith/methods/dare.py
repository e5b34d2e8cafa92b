"""Drop changes at random and rescale what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import small_changes
from weightsmith.core.kernel import Drop
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, choice, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import per_expert, spread
from weightsmith.ops.noise import keep_masks
from weightsmith.ops.rescale import L1, Masking

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dare"]


@dataclass(frozen=True)
class Dare(Masking, name="dare", needs=(BASE,), checks=(small_changes,)):
    """Drop changes at random and scale up the rest.

    Each entry of a task vector is kept with probability `density`: delta' = mask delta / density.
    density is 1 - p for the paper's drop rate p (0.9 typical, 0.99 for large instruction-tuned models).
    `rescale_rule: l1` is mergekit's: the survivors' factor is sum |delta| / sum |masked delta| per tensor, left at 1
    where either sum is below 1e-7.  Masks come from `ops.noise`: keyed by (seed, tensor, expert's name), equal
    on every machine; mergekit's and the paper's generators cannot be matched bit by bit, only in distribution.
    The paper's magnitude baseline is the filter `magnitude`.
    """

    paper = "Language Models are Super Mario (Yu et al., ICML 2024), arXiv:2311.03099"

    density: Each = number(0.5, "probability of keeping an entry", above=0, high=1, each=True)
    rescale: bool = flag(True, "scale the survivors up")
    rescale_rule: str = choice(
        "expectation", "expectation: divide by density; l1: keep each tensor's L1 norm", "expectation", "l1"
    )

    @property
    def keeps_l1(self) -> bool:
        return self.rescale and self.rescale_rule == "l1"

    def fused(self, count: int) -> Drop:
        # One of two rules: a factor per tensor that is measured, or 1 / density, which is known.
        factors = L1(self) if self.keeps_l1 else None
        return Drop(spread(self.density, count), self.name, factors, self.rescale and factors is None)

    def apply(self, site: Site) -> Site:
        if self.keeps_l1 or not self.rescale:
            return super().apply(site)
        masked = self.masked(site)
        # A division, not a product with 1 / density: the kernels divide, and the bytes are theirs.
        return site.with_deltas(masked / per_expert(site.spread(self.density), masked))

    def masked(self, site: Site) -> Tensor:
        return torch.where(keep_masks(site, site.spread(self.density), self.name), site.deltas, 0.0)
