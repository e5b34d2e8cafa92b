"""Mean of the best few models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weightsmith.core.checks import Case, Verdict, refuse
from weightsmith.core.kernel import WeightedSum
from weightsmith.core.method import Each, integer, number
from weightsmith.ops.combine import Summed, spread

__all__ = ["Soup"]


@dataclass(frozen=True)
class Soup(Summed, name="soup"):
    """Average the models with the best scores.

    Taken are the `size` models with the highest score, equals in recipe order; size 0: all of them.
    The uniform soup is size 0 (`linear`).  The greedy soup goes through the models by falling validation score and
    keeps one if the mean with it scores no worse: a choice that only an evaluation after every step can make.
    `weightsmith soup` makes it with a program that scores a folder, `weightsmith.greedy_soup` with a function.
    """

    paper = "Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482"

    score: Each = number(0.0, "validation score of each model, higher is better", each=True)
    size: int = integer(0, "how many of the best models are averaged; 0: all", low=0)

    def check(self, case: Case) -> Iterable[Verdict]:
        if self.size > case.count:
            return refuse(f"size = {self.size} is more than the {case.count} models")
        if 0 < self.size < case.count and len(set(spread(self.score, case.count))) == 1:
            return refuse(f"size = {self.size} of {case.count} models needs a score for each of them")
        return ()

    def fused(self, count: int) -> WeightedSum:
        scores = spread(self.score, count)
        # A stable sort: equals stay in recipe order.
        best = sorted(range(count), key=lambda i: -scores[i])[: self.size or count]
        # The others are read with weight 0: their NaNs are still refused.
        return WeightedSum(tuple(float(i in best) for i in range(count)), divisor=float(len(best)))
