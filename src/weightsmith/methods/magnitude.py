"""Keep the largest changes of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.kernel import Window
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Filter, Rows, flag, number
from weightsmith.core.site import Site, Summary
from weightsmith.ops import select
from weightsmith.ops.combine import per_expert, spread
from weightsmith.ops.rescale import l1_factors, l1_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(
    Filter,
    name="magnitude",
    needs=(BASE,),
    paper="TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708, its trim step per tensor",
    symmetric=True,
    scratch=2.5,
    histograms=1,
    cost=8.0,
):
    """Drop the smallest changes of every tensor.

    Kept: exactly the k = max(1, int(density numel)) largest |delta| of each tensor, equals by lower index.
    mergekit's `magnitude` sparsifier; with `rescale`, the survivors are multiplied by
    sum |delta| / sum |kept delta|.  Also the magnitude baseline of the DARE paper (per tensor).
    """

    density: Each = number(0.5, "share of each tensor's entries kept", above=0, high=1, each=True)
    rescale: bool = flag(False, "keep each tensor's L1 norm")

    @property
    def rounds(self) -> int:
        return select.ROUNDS + self.rescale

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        return round == 2 and select.settled(summary)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        if round < select.ROUNDS:
            return select.measure(site.deltas, site.summary, round)
        return l1_sums(site.deltas, self._masked(site))

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Tensor]:
        if round < select.ROUNDS:
            return select.digest(totals, round, summary, self.cuts)
        return {**summary, **l1_factors(totals)}

    def fused(self, count: int) -> Window:
        return Window("l1" if self.rescale else "")

    def apply(self, site: Site) -> Site:
        masked = self._masked(site)
        if self.rescale:
            masked = masked * per_expert(site.summary["l1.factors"], masked)
        return site.with_deltas(masked)

    def cuts(self, count: int, total: int) -> list[list[int]]:
        return [[select.keep_share(total, d)] for d in spread(self.density, count)]

    def _masked(self, site: Site) -> Tensor:
        deltas = site.deltas
        (kept,) = select.before(deltas, site.summary, site.start)
        return torch.where(kept, deltas, 0.0)
