"""Drop the merged weights that few tasks use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weightsmith.core.checks import Case, Verdict, refuse, remark
from weightsmith.core.errors import RecipeError
from weightsmith.core.kernel import Agreement
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, MergedFilter, Pass, integer, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import spread
from weightsmith.ops.length import AUTO, Lengthened
from weightsmith.ops.masks import agreed, task_masks

__all__ = ["Consensus"]


@dataclass(frozen=True)
class Consensus(Lengthened, MergedFilter, name="consensus", needs=(BASE,)):
    """Drop merged changes that few models use.

    Result: base + lambda c tau, tau the merged task vector, c the entries that at least k task masks select:
    c = (sum_t m_t) >= k with m_t = |delta_t| > tall_mask_lambda_t |tau - delta_t|, delta_t as before any filter.
    k 0 keeps everything, 1 drops weights that no task selects, 2 also those of one task only, n + 1 gives the base.
    Stands behind any method (alone: behind the plain sum of task vectors); give that method lambda 1 and scale
    here, since the masks compare with its tau.  The authors search lambda; auto makes each tensor's change as long as
    a mean expert's (`ops.length`), and 1 leaves the scale to the method in front (behind tsvm and its like: 1).
    0.3 to 0.4 suits a sum of 8.
    """

    paper = "TALL-masks and Consensus (Wang et al., ICML 2024), arXiv:2405.07813"

    k: int = integer(2, "how many task masks must select a weight", low=0)
    lambda_: float | str = number(AUTO, "scale of the filtered task vector", options=(AUTO,), smooth=True)
    tall_mask_lambda: Each = number(0.4, "strictness of the task masks; larger is sparser", low=0, each=True)

    def check(self, case: Case) -> Iterable[Verdict]:
        if self.k > case.count + 1:
            return refuse(f"k = {self.k} is outside [0, {case.count + 1}] for {case.count} models")
        if self.k > case.count:
            models = "1 model" if case.count == 1 else f"{case.count} models"
            return remark(f"k = {self.k} with {models} selects nothing: the result is the base")
        return ()

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return self.lengths()

    def fused(self, count: int) -> Agreement:
        scale = 1.0 if self.lambda_ == AUTO else float(self.lambda_)
        return Agreement(self.k, spread(self.tall_mask_lambda, count), scale, self.length)

    def apply(self, site: Site) -> Site:
        if site.origin is None:
            raise RecipeError("consensus works on the merged task vector; put it behind the merging method")
        # [*block]: behind the method there is one task vector.
        (tau,) = site.deltas
        # Of the experts' own task vectors, as read: a filter before the method does not change what a task needs.
        masks = task_masks(site.origin.deltas, tau, site.origin.spread(self.tall_mask_lambda))
        kept = torch.where(agreed(masks, self.k), tau, 0.0)
        return site.with_deltas(self.scaled(kept, site)[None])  # [1, *block]
