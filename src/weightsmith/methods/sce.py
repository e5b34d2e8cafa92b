"""Select what the models differ in, weigh them by energy, erase what goes against the majority."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Pass, Rows, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import disjoint, mean, weigh, weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_squares
from weightsmith.ops.select import Cut, Cuts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sce"]


@dataclass(frozen=True)
class Sce(Method, name="sce", needs=(BASE,)):
    """Keep what the models differ in, and weigh each model by the energy of its changes.

    Three steps per tensor on n task vectors delta_i:

    Select     the int(select_topk m) entries of largest variance over the models, m the number of variances that
               are not 0; equals by lower index.  select_topk 1 keeps everything.
    Calculate  w_i = mean(delta_i^2) over the tensor, divided by their sum; equal if the sum is below `equal_below`.
    Erase      the entries whose sign is not that of sum_i delta_i (a tie counts as plus).
    Result: base + sum w_i delta_i / sum w_i over those that are left.

    equal_below 1e-6 is mergekit's: small task vectors, say all below 5e-4, are then weighted alike.  0 is the paper.
    """

    paper = "FuseChat (Wan et al., 2024), arXiv:2408.07990"

    select_topk: float = number(1.0, "share of the entries that differ which is kept", low=0, high=1)
    equal_below: float = number(1e-6, "sum of mean squares below which all models weigh the same", low=0)

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        # First which entries are selected, then the energy of what is selected.
        return (self._squares.cut, self._squares) if self._squares.cut is not None else (self._squares,)

    @property
    def _squares(self) -> _Squares:
        return _Squares(_Differing(share=self.select_topk) if self.select_topk < 1 else None)

    def merge(self, site: Site) -> Tensor:
        kept = self._squares.selected(site)
        weights = self._weights(site)
        # An elected sign of 0 counts as plus.
        # The election is unweighted: weights are energies of tensors, not votes.
        signs = (weighted_sum(kept.detach()).sign() + 0.5).sign()
        assert site.base is not None
        # sum w_i delta_i / sum w_i over those who agree: the weights are normalised once more, entry by entry.
        return site.base + disjoint(weigh(kept, weights), signs, weights)

    def _weights(self, site: Site) -> list[float]:
        means = site.result(self._squares) / max(site.key.numel, 1)
        total = float(weighted_sum(means))
        if total < self.equal_below or total == 0:
            return [1 / site.count] * site.count
        return [float(m) / total for m in means]


@dataclass(frozen=True)
class _Differing(Cut):
    """The cut after a share of the entries that differ, by their deviation over the models."""

    share: float = 1.0

    @property
    def viewed(self) -> str:
        # sweeps share the histograms, whatever select_topk is
        return "deviation"

    def values(self, site: Site) -> Tensor:
        return _deviation(site.deltas)[None]  # [1, *block]

    def see(self, site: Site) -> State:
        # Entries that are equal in all models are not candidates.
        return {**super().see(site), "differing": (self.values(site) != 0).sum().cpu()}

    def end(self, total: Mapping[str, Any]) -> Pass[Cuts]:
        return self.within(np.asarray(total["high"]), self.ranks(int(total["differing"])))

    def ranks(self, total: int) -> list[list[int]]:
        """`total`: those that differ."""
        return [[int(self.share * total)]]


@dataclass(frozen=True)
class _Squares(Pass["Tensor"]):
    """sum delta^2 over what is selected: float64 [n]."""

    cut: _Differing | None

    def see(self, site: Site) -> State:
        return {"squares": Rows(torch.stack([row_squares(d) for d in self.selected(site)]).cpu())}

    def end(self, total: Mapping[str, Any]) -> Tensor:
        return pairwise_sum(torch.as_tensor(total["squares"]))

    def selected(self, site: Site) -> Tensor:
        deltas = site.deltas
        if self.cut is None:
            return deltas
        ((chosen,),) = site.result(self.cut).before(_deviation(deltas)[None], site.start)
        return torch.where(chosen, deltas, 0.0)


def _deviation(deltas: Tensor) -> Tensor:
    """The standard deviation over the models, in the order of the variance, which would underflow first."""
    with torch.no_grad():
        wide = deltas.double()  # float64: the square of a change of 1e-24 is below float32
        return mean((wide - mean(wide)).square()).sqrt().float()
