"""What is counted and summed over every entry of every task vector, in blocks, at the speed of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.pass_ import Pass, State
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import block_sizes, block_sums
from weightsmith.ops.select import Cut, keep_share

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.core.site import Site

__all__ = ["PEAK", "SIGMAS", "TOP", "Largest", "Overall", "Tops", "survey"]

TOP = 0.2
"""Share of a tensor's entries in a top mask: the largest magnitudes, as `ties` keeps them by default."""
PEAK = 0.001
"""Share of a tensor's entries whose part of the sum of squares is measured."""
SIGMAS = 6.0
"""An entry is an outlier if its magnitude is above this times the root mean square of its tensor's task vector."""


@dataclass(frozen=True)
class Tops(Cut):
    """Two cuts per task vector: after the top mask and after the peak."""

    count: int = 1

    def ranks(self, total: int) -> list[list[int]]:
        return [[keep_share(total, TOP), keep_share(total, PEAK)]] * self.count


@dataclass(frozen=True)
class Overall(Pass[dict[str, Any]]):
    """Over all entries, for n experts with task vectors tau_1 .. tau_n:

    gram        [n+1, n+1] float64, inner products of base, tau_1, .., tau_n
    mass        [n] float64, sum |tau_i|
    outvoted    float64, sum over entries of min(P, N): P the sum of the positive tau_i, N that of the negative |tau_i|
    zeros       [n] int, entries that are exactly zero
    shared      int, entries that at least two experts changed
    clash       int, entries that one expert raised and another lowered

    The integers are the same for every way to cut a tensor.  The sums are over blocks of a fixed size (the engine's),
    so that no setting changes them; another cut would, by rounding in float64.
    """

    def see(self, site: Site) -> State:
        return _all(site, site.deltas)

    def end(self, total: Mapping[str, Any]) -> dict[str, Any]:
        return dict(total)


@dataclass(frozen=True)
class Largest(Pass[dict[str, Any]]):
    """Of the entries that are large within their tensor:

    masks       [n, n] int, entries in both top masks: the int(TOP m) largest of m magnitudes of each, at least one,
                equals by lower flat index (`ops.select`), without zeros
    outliers    [n] int, entries with |tau_i| > SIGMAS rms_i, rms_i over this tensor
    peak        [n] float64, sum of squares of the int(PEAK m) largest, at least one
    """

    tops: Tops
    overall: Overall

    def see(self, site: Site) -> State:
        deltas = site.deltas
        top, peak = site.result(self.tops).before(deltas, site.start)
        masks = (top & (deltas != 0)).reshape(site.count, -1).double()  # float64 counts exactly up to 2^53
        rms = (site.result(self.overall)["gram"].diagonal()[1:] / site.key.numel).sqrt().tolist()
        large = [(d.abs() > SIGMAS * r).sum() for d, r in zip(deltas, rms, strict=True)]
        squares = [block_sums((d.double() * p).square()) for d, p in zip(deltas, peak, strict=True)]
        return {
            "masks": (masks @ masks.T).long().cpu(),
            "outliers": torch.stack(large).cpu(),
            "peak": torch.stack(squares).cpu(),
        }

    def end(self, total: Mapping[str, Any]) -> dict[str, Any]:
        return dict(total)


def survey(count: int) -> tuple[Overall, Tops, Largest]:
    """All passes, for a number of experts."""
    tops, overall = Tops(count=count), Overall()
    return overall, tops, Largest(tops, overall)


def _all(site: Site, deltas: Tensor) -> dict[str, Tensor]:
    """Sums over all entries of a block: [n, *block]."""
    assert site.base is not None
    vectors = torch.cat([site.base[None], deltas]).reshape(site.count + 1, -1).double()
    moved = (deltas != 0).reshape(site.count, -1)
    raised, lowered = weighted_sum(deltas.clamp(min=0)), weighted_sum(deltas.clamp(max=0)).neg()
    return {
        "gram": (vectors @ vectors.T).cpu(),
        "mass": torch.stack([block_sizes(d) for d in deltas]).cpu(),
        "outvoted": block_sums(torch.minimum(raised, lowered)).cpu(),
        "zeros": (~moved).sum(1).cpu(),
        "shared": (moved.sum(0, dtype=torch.int32) >= 2).sum().cpu(),
        "clash": ((raised > 0) & (lowered > 0)).sum().cpu(),
    }
