"""What is counted and summed over every entry of every task vector, in blocks, at the speed of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Rows, Scope, Traits
from weightsmith.ops import select
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import block_sizes, block_sums

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.core.keys import Key
    from weightsmith.core.site import Site, Summary

__all__ = ["PEAK", "SIGMAS", "TOP", "Survey"]

TOP = 0.2
"""Share of a tensor's entries in a top mask: the largest magnitudes, as `ties` keeps them by default."""
PEAK = 0.001
"""Share of a tensor's entries whose part of the sum of squares is measured."""
SIGMAS = 6.0
"""An entry is an outlier if its magnitude is above this times the root mean square of its tensor's task vector."""


@dataclass(frozen=True)
class Survey(Method):
    """Four measuring passes over a tensor; the last summary holds, for n experts with task vectors tau_1 .. tau_n:

    gram        [n+1, n+1] float64, inner products of base, tau_1, .., tau_n
    mass        [n] float64, sum |tau_i|
    outvoted    float64, sum over entries of min(P, N): P the sum of the positive tau_i, N that of the negative |tau_i|
    zeros       [n] int, entries that are exactly zero
    shared      int, entries that at least two experts changed
    clash       int, entries that one expert raised and another lowered
    masks       [n, n] int, entries in both top masks: the int(TOP m) largest of m magnitudes of each, at least one,
                equals by lower flat index (`ops.select`), without zeros
    outliers    [n] int, entries with |tau_i| > SIGMAS rms_i, rms_i over this tensor
    peak        [n] float64, sum of squares of the int(PEAK m) largest, at least one

    The integers are the same for every way to cut a tensor.  The sums are over blocks of a fixed size (the engine's),
    so that no setting changes them; another cut would, by rounding in float64.
    """

    traits: ClassVar[Traits] = Traits("inspect", needs=(BASE,), scratch=8.0, histograms=2)

    @property
    def rounds(self) -> int:
        return select.ROUNDS + 1

    @property
    def scope(self) -> Scope:
        return Scope.MODEL  # the engine's public measuring pass; here every tensor is digested by itself

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        return round == 2 and select.settled(summary)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        deltas = site.deltas
        if round == select.ROUNDS:
            return _largest(site, deltas)
        found = select.measure(deltas, site.summary, round)
        return {**found, **_all(site, deltas)} if round == 0 else found

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Any]:
        own = {name: value for name, value in totals.items() if not name.startswith("select.")}
        if round < select.ROUNDS:
            summary = select.digest(totals, round, summary, _cuts)
        return {**summary, **own}


def _cuts(count: int, total: int) -> list[list[int]]:
    return [[select.keep_share(total, TOP), select.keep_share(total, PEAK)]] * count


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


def _largest(site: Site, deltas: Tensor) -> dict[str, Tensor | Rows]:
    """Counts of the entries that are large within their tensor."""
    top, peak = select.before(deltas, site.summary, site.start)
    masks = (top & (deltas != 0)).reshape(site.count, -1).double()  # float64 counts exactly up to 2^53
    rms = (site.summary["gram"].diagonal()[1:] / site.key.numel).sqrt().tolist()
    return {
        "masks": (masks @ masks.T).long().cpu(),
        "outliers": torch.stack([(d.abs() > SIGMAS * r).sum() for d, r in zip(deltas, rms, strict=True)]).cpu(),
        "peak": torch.stack([block_sums((d.double() * p).square()) for d, p in zip(deltas, peak, strict=True)]).cpu(),
    }
