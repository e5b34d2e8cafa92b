"""Mask both tails of every task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.kernel import Window
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Filter, Rows, choice, flag, number
from weightsmith.core.site import Site, Summary
from weightsmith.ops import select
from weightsmith.ops.combine import per_expert, spread
from weightsmith.ops.rescale import l1_factors, l1_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Breadcrumbs"]


@dataclass(frozen=True)
class Breadcrumbs(
    Filter,
    name="breadcrumbs",
    needs=(BASE,),
    paper="Model Breadcrumbs (Davari and Belilovsky, ECCV 2024), arXiv:2312.06795",
    symmetric=True,
    scratch=3.0,
    histograms=2,
    cost=13.0,
):
    """Drop the smallest changes and the very largest ones.

    What survives is ranked R+1 .. R+K by falling |delta|:

    tensor  ranks over the tensor (the paper's text, mergekit): K = int(density numel), R = int(remove_top numel),
            R cut down so that K survive; density 1 leaves the tensor as it is.
    row     ranks over each slice along the last axis (the authors' code), m long: K = int(m density),
            R = int(m remove_top).  A vector is one row.  `remove_first: false` takes the R largest out of the
            K kept, so that ranks R+1 .. K survive.
    Equals go by lower index.  Single numbers (0-dim) stay as they are.  Rows are as stored: for GPT-2's
    transposed layers they run along the outputs.  The paper calls the tails beta and gamma, its code
    `beta` (density) and `gamma` (remove_top).  The authors start at row, density 0.15, remove_top 0.006 and
    task_arithmetic with lambda 0.2 of the sum.
    """

    density: Each = number(0.9, "share of entries kept", above=0, high=1, each=True)
    remove_top: Each = number(0.01, "share of the largest entries dropped", low=0, below=1, each=True)
    scope_: str = choice("tensor", "what entries are ranked over", "tensor", "row")
    remove_first: bool = flag(True, "row: drop the largest before counting those kept")
    rescale: bool = flag(False, "keep each tensor's L1 norm")

    @property
    def rounds(self) -> int:
        return select.ROUNDS + self.rescale

    def remark(self, count: int) -> str | None:
        """Of rows, whose window may fall off the end; that of a tensor is moved instead."""
        shares = list(zip(spread(self.density, count), spread(self.remove_top, count), strict=True))
        if self.scope_ == "tensor" or not self.remove_first or all(sum(share) <= 1 + 1e-9 for share in shares):
            return None
        left = ", ".join(dict.fromkeys(f"{min(density, 1 - top):.3g}" for density, top in shares))
        return f"density + remove_top is more than 1: of each row only {left} survives"

    def remark_on(self, key: Key, count: int) -> str | None:
        total = key.numel if self.scope_ == "tensor" else key.shape[-1] if key.shape else 0
        if not (key.shape and total) or all(first < last for first, last in self.cuts(count, total)):
            return None
        return f"with these shares no entry of only {total} survives, so nothing changes there"

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        if round < select.ROUNDS and not self._ranks_tensor(key):
            return True
        return round == 2 and select.settled(summary)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        if round == select.ROUNDS:
            return l1_sums(site.deltas, self._masked(site))
        return select.measure(site.deltas, site.summary, round) if self._ranks_tensor(site.key) else {}

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Tensor]:
        if round == select.ROUNDS:
            return {**summary, **l1_factors(totals)}
        return select.digest(totals, round, summary, self.cuts) if totals else {**summary}

    def fused(self, count: int) -> Window | None:
        return Window("l1" if self.rescale else "") if self.scope_ == "tensor" else None

    def apply(self, site: Site) -> Site:
        masked = self._masked(site)
        if self.rescale:
            masked = masked * per_expert(site.summary["l1.factors"], masked)
        return site.with_deltas(masked)

    def _ranks_tensor(self, key: Key) -> bool:
        """Whether the ranking is over the whole tensor, and so needs the measuring rounds."""
        return len(key.shape) == 1 or (self.scope_ == "tensor" and len(key.shape) > 0)

    def _window(self, total: int, density: float, remove_top: float) -> list[int]:
        """The survivors, as [first, last) in the ranking."""
        kept, dropped = int(total * density), int(total * remove_top)
        if self.scope_ == "tensor":
            if density >= 1:
                return [0, total]
            tail = max(0, total - kept - dropped)  # smallest entries dropped
            return [total - tail - kept, total - tail]
        return [dropped, dropped + kept] if self.remove_first else [min(dropped, kept), kept]

    def cuts(self, count: int, total: int) -> list[list[int]]:
        shares = zip(spread(self.density, count), spread(self.remove_top, count), strict=True)
        return [self._window(total, *share) for share in shares]

    def _masked(self, site: Site) -> Tensor:
        deltas = site.deltas
        if not site.key.shape:
            return deltas
        if self._ranks_tensor(site.key):
            first, last = select.before(deltas, site.summary, site.start)
        else:
            cuts = self.cuts(site.count, site.key.shape[-1])
            first, last = (
                torch.stack([select.leading(d, c[side]) for d, c in zip(deltas, cuts, strict=True)]) for side in (0, 1)
            )
        return torch.where(last & ~first, deltas, 0.0)
