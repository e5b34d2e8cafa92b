"""Checkpoints of one run, averaged by their loss, score or step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.method import Each, Method, WeightedSum, choice, number
from weightsmith.ops.combine import apply_weighted_sum, spread
from weightsmith.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mwa"]


@dataclass(frozen=True)
class Mwa(
    Method,
    name="mwa",
    paper="Metrics-Weighted Averaging (Yu and Choi, 2025), arXiv:2504.18580",
    symmetric=True,
    scratch=0.5,
    cost=1.0,
):
    """sum_c u_c x_c / sum_c u_c over checkpoints x_c with metric m_c and penalty p.

    power    u = (min m / m)^p for a loss, (m / max m)^p for steps and scores
    softmax  u = exp(-p d / (max m - min m)), d the distance from the best; all equal: 1
    rank     u = r^p, r = 1 for the worst .. C for the best; equal metrics share the mean rank

    p = 0 is the plain mean, a large p the best checkpoint.  The weights do not change when all metrics are multiplied
    by one number.  The paper's formula in print could not be compared: it has weights from loss or steps and one
    penalty factor, as here.  Full checkpoints, or adapters of one run and one initialisation.
    """

    value: Each = number(1.0, "loss, score or step of each checkpoint", each=True)
    metric: str = choice("loss", "what the values are; of a loss the lowest is best", "loss", "steps", "score")
    penalty: float = number(1.0, "how strongly the better ones are preferred (0 not at all)", low=0)
    rule: str = choice("power", "from values to weights", "power", "softmax", "rank")

    def check(self, count: int, has_base: bool) -> str | None:
        low = min(spread(self.value, count))
        if self.rule == "power" and (low < 0 or (low == 0 and self.metric == "loss")):
            wanted = "above 0" if self.metric == "loss" else "of at least 0"
            return f"rule power needs values {wanted}, not {low:g}; use rule softmax or rank"
        return None

    def fused(self, count: int) -> WeightedSum:
        weights = self._weights(spread(self.value, count))
        return WeightedSum(weights, divisor=sum(weights))

    def merge(self, site: Site) -> Tensor:
        return apply_weighted_sum(self.fused(site.count), site)

    def _weights(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """u_c, 1 for the best."""
        best, worst = min(values), max(values)
        if self.metric != "loss":
            best, worst = worst, best
        if best == worst:
            return (1.0,) * len(values)
        if self.rule == "softmax":
            return tuple(math.exp(-self.penalty * (v - best) / (worst - best)) for v in values)
        if self.rule == "rank":
            ordered = sorted(values, reverse=self.metric == "loss")
            ranks = [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]
            return tuple((rank / max(ranks)) ** self.penalty for rank in ranks)
        return tuple((best / v if self.metric == "loss" else v / best) ** self.penalty for v in values)
