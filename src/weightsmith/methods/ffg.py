"""Undo the changes that the loss would not miss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import Case, Verdict, refuse
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Filter, Pass, Scope, choice, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import spread
from weightsmith.ops.moments import curvature, powered
from weightsmith.ops.select import Largest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ffg"]


@dataclass(frozen=True)
class Ffg(Filter, name="ffg", needs=(BASE, "second_moment")):
    """Keep the changes that matter most to the loss of each model, counted over the whole model.

    Score of an entry: v delta^2, the second-order increase of the loss if the change is undone, with v the second
    moment of Adam (statistic "second_moment", >= 0, shaped like the weights).  Kept: every entry at or above the
    (int(density d) + 1)-th largest score of all d entries of the model, or with `threshold` above 0 every score >=
    threshold (the paper's values, 6e-21 to 1e-18, leave about 40%).
    """

    paper = (
        "Harnessing Optimization Dynamics for Curvature-Informed Model Merging (2025), arXiv:2509.11167, "
        "Fast Fisher Grafting"
    )

    density: Each = number(0.4, "share of each model's entries kept", above=0, high=1, each=True)
    threshold: Each = number(0.0, "least score kept, in place of density; 0 for density", low=0, each=True)
    metric: str = choice("fisher", "score: v delta^2, or |delta|", "fisher", "magnitude")

    def check(self, case: Case) -> Iterable[Verdict]:
        given = spread(self.threshold, case.count)
        some = any(given) and not all(given)
        return refuse("some thresholds are 0; give every model one above 0, or none" if some else None)

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return () if any(spread(self.threshold, count)) else (self._cut(count),)

    def apply(self, site: Site) -> Site:
        deltas, least = site.deltas, spread(self.threshold, site.count)
        if any(least):
            sizes = curvature(site, "second_moment") if self.metric == "fisher" else (None,) * site.count
            scores = [d.abs() if v is None else v * d.square() for v, d in zip(sizes, deltas, strict=True)]
            kept = torch.stack([score >= t for score, t in zip(scores, least, strict=True)])
        else:
            cut = self._cut(site.count)
            (kept,) = site.result(cut).before(cut.values(site), site.start)
        return site.with_deltas(torch.where(kept, deltas, 0.0))

    def _cut(self, count: int) -> Largest:
        return _Scores(scope=Scope.MODEL, with_equals=True, densities=spread(self.density, count), metric=self.metric)


@dataclass(frozen=True)
class _Scores(Largest):
    """The largest scores of each model; ranked by their roots, sqrt(v) |delta|, which do not underflow."""

    metric: str = "fisher"

    def values(self, site: Site) -> Tensor:
        deltas = site.deltas
        if self.metric == "magnitude":
            return deltas
        moments = curvature(site, "second_moment")
        return torch.stack([powered(v, 0.5) * d for v, d in zip(moments, deltas, strict=True)])

    @property
    def viewed(self) -> Hashable:
        return self.metric
