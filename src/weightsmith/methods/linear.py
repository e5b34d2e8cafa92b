"""Weighted mean of models."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.kernel import WeightedSum
from weightsmith.core.method import Each, flag, number
from weightsmith.ops.combine import (
    Summed,
    normaliser,
    shown_shares,
    spread,
    usable_weights,
)

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear(Summed, name="linear", checks=(usable_weights, shown_shares), aliases=("average", "uniform_soup")):
    """Average the models' weights.

    Result: sum_i w_i x_i / sum_i w_i.
    Products and sums are rounded to float32, in recipe order; the division comes last (as in mergekit's
    `linear`).  The base takes no part: list it among the models to include it.
    """

    paper = "Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482"

    weight: Each = number(1.0, "share of each model", each=True, smooth=True)
    normalize: bool = flag(True, "divide by the sum of the weights")

    def fused(self, count: int) -> WeightedSum:
        weights = spread(self.weight, count)
        # Divided after the sum, as mergekit does: three weights of 1 / 3 would not add up to 1.
        return WeightedSum(weights, divisor=normaliser(weights, self.normalize))
