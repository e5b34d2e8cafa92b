"""Select what the models differ in, weigh them by energy, erase what goes against the majority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Rows, number
from weightsmith.core.site import Site, Summary
from weightsmith.ops import select
from weightsmith.ops.combine import disjoint, mean, weigh, weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sce"]


@dataclass(frozen=True)
class Sce(
    Method,
    name="sce",
    needs=(BASE,),
    paper="FuseChat (Wan et al., 2024), arXiv:2408.07990",
    symmetric=True,
    scratch=4.0,
    cost=5.7,
):
    """Keep what the models differ in, and weigh each model by the energy of its changes.

    Three steps per tensor on n task vectors delta_i:

    Select     the int(select_topk m) entries of largest variance over the models, m the number of variances that
               are not 0; equals by lower index.  select_topk 1 keeps everything.
    Calculate  w_i = mean(delta_i^2) over the tensor, divided by their sum; equal if the sum is below `equal_below`.
    Erase      the entries whose sign is not that of sum_i delta_i (a tie counts as plus).
    Result: base + sum w_i delta_i / sum w_i over those that are left.

    equal_below 1e-6 is mergekit's: small task vectors, say all below 5e-4, are then weighted alike.  0 is the paper.
    """

    select_topk: float = number(1.0, "share of the entries that differ which is kept", low=0, high=1)
    equal_below: float = number(1e-6, "sum of mean squares below which all models weigh the same", low=0)

    @property
    def rounds(self) -> int:
        return self._selecting + 1

    @property
    def _selecting(self) -> int:
        return select.ROUNDS if self.select_topk < 1 else 0

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        return round == 2 and self._selecting > 0 and select.settled(summary)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        if round == self._selecting:
            return {"sce.squares": Rows(torch.stack([row_squares(d) for d in self._selected(site)]).cpu())}
        spread = _deviation(site.deltas)[None]
        found = select.measure(spread, site.summary, round)
        return {**found, "sce.differing": (spread != 0).sum().cpu()} if round == 0 else found

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Any]:
        if round == self._selecting:
            return {**summary, "sce.squares": pairwise_sum(torch.as_tensor(totals["sce.squares"]))}

        def cuts(count: int, total: int) -> list[list[int]]:
            return [[int(self.select_topk * int(totals["sce.differing"]))]]

        return select.digest(totals, round, summary, cuts)

    def merge(self, site: Site) -> Tensor:
        kept = self._selected(site)
        weights = self._weights(site)
        # An elected sign of 0 counts as plus.
        signs = (weighted_sum(kept.detach()).sign() + 0.5).sign()
        assert site.base is not None
        return site.base + disjoint(weigh(kept, weights), signs, weights)

    def _weights(self, site: Site) -> list[float]:
        means = site.summary["sce.squares"] / max(site.key.numel, 1)
        total = float(weighted_sum(means))
        if total < self.equal_below or total == 0:
            return [1 / site.count] * site.count
        return [float(m) / total for m in means]

    def _selected(self, site: Site) -> Tensor:
        deltas = site.deltas
        if not self._selecting:
            return deltas
        ((chosen,),) = select.before(_deviation(deltas)[None], site.summary, site.start)
        return torch.where(chosen, deltas, 0.0)


def _deviation(deltas: Tensor) -> Tensor:
    """The standard deviation over the models, in the order of the variance, which would underflow first."""
    with torch.no_grad():
        wide = deltas.double()
        return mean((wide - mean(wide)).square()).sqrt().float()
