"""Weighted mean of models."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.kernel import WeightedSum
from weightsmith.core.method import Each, flag, number
from weightsmith.ops.combine import Summed, normaliser, shares_remark, spread, unusable_weights

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear(
    Summed,
    name="linear",
    aliases=("average", "uniform_soup"),
    paper="Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482",
    symmetric=True,
    scratch=0.5,
    cost=1.0,
):
    """Average the models' weights.

    Result: sum_i w_i x_i / sum_i w_i.
    Products and sums are rounded to float32, in recipe order; the division comes last (as in mergekit's
    `linear`).  The base takes no part: list it among the models to include it.
    """

    weight: Each = number(1.0, "share of each model", each=True, smooth=True)
    normalize: bool = flag(True, "divide by the sum of the weights")

    def check(self, count: int, has_base: bool) -> str | None:
        return unusable_weights(spread(self.weight, count), self.normalize)

    def remark(self, count: int) -> str | None:
        return shares_remark(spread(self.weight, count), self.normalize)

    def fused(self, count: int) -> WeightedSum:
        weights = spread(self.weight, count)
        return WeightedSum(weights, divisor=normaliser(weights, self.normalize))
