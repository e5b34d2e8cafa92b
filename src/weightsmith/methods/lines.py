"""Scale the merged change linearly with depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.core.checks import Case, Verdict, by_depth, remark
from weightsmith.core.errors import RecipeError
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, MergedFilter, Pass, Scope, choice, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import block_sizes

__all__ = ["Lines"]


@dataclass(frozen=True)
class Lines(MergedFilter, name="lines", needs=(BASE,), checks=(by_depth,)):
    """Scale the merged change by depth: less in early blocks, more in late ones.

    tau is multiplied by alpha + beta l / (L-1) in block l of L, by alpha outside the blocks.
    Shallow blocks carry most of the forgetting, deep ones most of the gain.  Stands behind a method that uses
    lambda 1: `task_arithmetic | lines`.  With one expert it edits a fine-tuned model: alpha 0..1.
    alpha "auto" is (|sum_i delta_i|_1 / |tau|_1) / n over the whole model, from the experts' task vectors as they
    were before any filter: 1/n for a plain sum.  beta then takes the place of lambda: search 0.1 to 1.  beta "auto"
    is 0.5 for several experts; for one it is 1 - alpha, so that the last block keeps its change.

    outside   alpha: all tensors outside the blocks get alpha (the authors' code, whose heads are kept apart);
              depth: embeddings get alpha, final norm and head alpha + beta (for language models with a tuned head;
              an extension).
    A stack of one block counts as the last.  Encoder and decoder have a depth each.
    """

    paper = "LiNeS (Wang et al., ICLR 2025), arXiv:2410.17146"

    alpha: float | str = number("auto", "scale of the first block", low=0, options=("auto",), smooth=True)
    beta: float | str = number("auto", "what the last block gets on top of alpha", options=("auto",), smooth=True)
    outside: str = choice("alpha", "scale of tensors outside the blocks", "alpha", "depth")

    def check(self, case: Case) -> Iterable[Verdict]:
        said = []
        if not isinstance(self.alpha, str) and self.alpha > 1:
            said.append(f"alpha = {self.alpha:g} is above 1: more than the whole change")
        if not isinstance(self.beta, str) and self.beta < 0:
            said.append(f"beta = {self.beta:g} is below 0: deep blocks get less than shallow ones")
        if self.alpha == 0 and self.outside == "alpha":
            said.append("alpha 0 gives embeddings, final norm and head back to the base; with outside: depth a tuned "
                        "head keeps its change")  # fmt: skip
        return remark("; ".join(said))

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        # The ratio goes over the whole model: a pass of its own before anything is scaled.
        return (RATIO,) if self.alpha == "auto" else ()

    def apply(self, site: Site) -> Site:
        return site.with_deltas(site.deltas * self._factor(site))

    def _factor(self, site: Site) -> float:
        count = _before_all(site).count  # n: behind the method, site.count is 1
        alpha = site.result(RATIO) / count if isinstance(self.alpha, str) else 1.0 * self.alpha
        # One model keeps its last block whole (alpha + beta = 1); for several 0.5 is where a search starts.
        beta = 1.0 * self.beta if not isinstance(self.beta, str) else 1 - alpha if count == 1 else 0.5
        depth = site.depth
        if depth is None and self.outside == "depth":
            # By where they stand in the network.
            depth = {"embed": 0.0, "norm": 1.0, "head": 1.0}.get(site.key.role)
        return alpha if depth is None else alpha + beta * depth


@dataclass(frozen=True)
class _Ratio(Pass[float]):
    """|sum_i delta_i|_1 / |tau|_1; 0 where nothing is merged."""

    def see(self, site: Site) -> State:
        # The plain sum of task vectors before any filter or method.
        raw = _before_all(site).deltas
        return {"raw": block_sizes(weighted_sum(raw)).cpu(), "merged": block_sizes(site.deltas[0]).cpu()}

    def end(self, total: Mapping[str, Any]) -> float:
        merged = total["merged"]
        return float(torch.where(merged > 0, total["raw"] / merged.clamp(min=1e-300), 0.0))


RATIO = _Ratio(scope=Scope.MODEL)


def _before_all(site: Site) -> Site:
    if site.origin is None:
        raise RecipeError("lines works on the merged task vector; put it behind the merging method")
    return site.origin
