"""Scale the merged change linearly with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.errors import RecipeError
from weightsmith.lazy import torch
from weightsmith.method import BASE, Filter, Rows, Scope, choice, number
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_sizes
from weightsmith.site import Site, Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lines"]


@dataclass(frozen=True)
class Lines(
    Filter,
    name="lines",
    needs=(BASE,),
    paper="LiNeS (Wang et al., ICLR 2025), arXiv:2410.17146",
    after=True,
    by_depth=True,
    keeps_expert=False,
    scratch=1.5,
    cost=8.0,
):
    """Multiply the merged task vector tau by alpha + beta l / (L-1) in block l of L, by alpha outside the blocks.

    Shallow blocks carry most of the forgetting, deep ones most of the gain.  Stands behind a method that uses
    lambda 1: `task_arithmetic | lines`.  With one expert it edits a fine-tuned model (alpha 0..1, beta 1 - alpha).
    alpha "auto" is (|sum_i delta_i|_1 / |tau|_1) / n over the whole model, from the experts' task vectors as they
    were before any filter: 1/n for a plain sum.  beta then takes the place of lambda: search 0.1 to 1.

    outside   alpha: all tensors outside the blocks get alpha (the authors' code, whose heads are kept apart);
              depth: embeddings get alpha, final norm and head alpha + beta (for language models with a tuned head;
              an extension).
    A stack of one block counts as the last.  Encoder and decoder have a depth each.
    """

    alpha: float | str = number("auto", "scale of the first block", low=0, options=("auto",))
    beta: float = number(0.5, "what the last block gets on top of alpha")
    outside: str = choice("alpha", "scale of tensors outside the blocks", "alpha", "depth")

    @property
    def rounds(self) -> int:
        return 1 if self.alpha == "auto" else 0

    @property
    def scope(self) -> Scope:
        return Scope.MODEL

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        raw = _before_all(site).deltas
        return {
            "lines.raw": pairwise_sum(row_sizes(weighted_sum(raw))).cpu(),
            "lines.merged": pairwise_sum(row_sizes(site.deltas[0])).cpu(),
        }

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Tensor]:
        merged = totals["lines.merged"]
        # Nothing merged, nothing to scale.
        return {"lines.ratio": torch.where(merged > 0, totals["lines.raw"] / merged.clamp(min=1e-300), 0.0)}

    def apply(self, site: Site) -> Site:
        return site.with_deltas(site.deltas * self._factor(site))

    def _factor(self, site: Site) -> float:
        if isinstance(self.alpha, str):
            alpha = float(site.summary["lines.ratio"]) / _before_all(site).count
        else:
            alpha = float(self.alpha)
        depth = site.depth
        if depth is None and self.outside == "depth":
            depth = {"embed": 0.0, "norm": 1.0, "head": 1.0}.get(site.key.role)
        return alpha if depth is None else alpha + self.beta * depth


def _before_all(site: Site) -> Site:
    if site.origin is None:
        raise RecipeError("lines works on the merged task vector; put it behind the merging method")
    return site.origin
