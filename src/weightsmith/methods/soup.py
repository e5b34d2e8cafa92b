"""Mean of the best few models."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.kernel import WeightedSum
from weightsmith.core.method import Each, integer, number
from weightsmith.ops.combine import Summed, spread

__all__ = ["Soup"]


@dataclass(frozen=True)
class Soup(
    Summed,
    name="soup",
    paper="Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482",
    symmetric=True,
    scratch=0.5,
    cost=2.0,
):
    """Average the models with the best scores.

    Taken are the `size` models with the highest score, equals in recipe order; size 0: all of them.
    The uniform soup is size 0 (`linear`).  The greedy soup goes through the models by falling validation score and
    keeps one if the mean with it scores no worse: a choice that only an evaluation after every step can make.
    `weightsmith soup` makes it with a program that scores a folder, `weightsmith.greedy_soup` with a function.
    """

    score: Each = number(0.0, "validation score of each model, higher is better", each=True)
    size: int = integer(0, "how many of the best models are averaged; 0: all", low=0)

    def check(self, count: int, has_base: bool) -> str | None:
        if self.size > count:
            return f"size = {self.size} is more than the {count} models"
        if 0 < self.size < count and len(set(spread(self.score, count))) == 1:
            return f"size = {self.size} of {count} models needs a score for each of them"
        return None

    def fused(self, count: int) -> WeightedSum:
        scores = spread(self.score, count)
        best = sorted(range(count), key=lambda i: -scores[i])[: self.size or count]
        return WeightedSum(tuple(float(i in best) for i in range(count)), divisor=float(len(best)))
