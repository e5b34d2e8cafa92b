"""Take over only the changes that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Method, Rows
from weightsmith.core.site import Site, Summary
from weightsmith.ops import order
from weightsmith.ops.reduce import pairwise_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ArceeFusion"]


@dataclass(frozen=True)
class ArceeFusion(
    Method,
    name="arcee_fusion",
    paper="Arcee Fusion (Arcee AI, 2025); as in mergekit",
    keeps_expert=False,
    max_count=1,
    scratch=12.0,
    histograms=3,
    cost=54.0,
):
    """Take over the changes that stand out.

    Result: base + delta where importance >= median + 1.5 (q3 - q1), all three over the tensor's m importances.
    importance = |delta| KL(softmax(expert) + 1e-8 || softmax(base) + 1e-8), the divergence between slices along the
    last axis.  The quantile q is entry int(q (m - 1)) of the rising order, exact for any size (mergekit samples a
    million entries of larger tensors, at random).  In a vector the divergence is one common factor and is left out.
    """

    @property
    def rounds(self) -> int:
        return 1 + order.ROUNDS

    def check(self, count: int, has_base: bool) -> str | None:
        return None if has_base else "needs a base model; add base to the recipe"

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        return round == 0 and len(key.shape) < 2

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        if round:
            return order.measure(_importance(site)[None], site.summary, round - 1)
        return {"arcee.divergence": Rows(_divergence(site).cpu())} if len(site.key.shape) > 1 else {}

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Any]:
        if round == 0:
            return {**totals}
        found = order.digest(totals, round - 1, summary, lambda m: [int(q * (m - 1)) for q in (0.25, 0.5, 0.75)])
        return {**summary, **found}

    def merge(self, site: Site) -> Tensor:
        first, median, third = site.summary["order.values"][0].tolist()
        kept = _importance(site) >= median + 1.5 * (third - first)
        assert site.base is not None
        return site.base + torch.where(kept, site.deltas[0], 0.0)


def _importance(site: Site) -> Tensor:
    """float32, whose order decides."""
    size = site.deltas[0].detach().abs()
    if len(site.key.shape) < 2:
        return size.float()
    rows = torch.as_tensor(site.summary["arcee.divergence"])[..., site.start : site.start + size.shape[0]]
    divergence = rows.T.reshape(size.shape[:-1]).to(size.device)
    return (size * divergence.unsqueeze(-1)).float()


def _divergence(site: Site) -> Tensor:
    """Of the slices along the last axis, as many to a row as it has: float64 [slices, rows]."""
    assert site.base is not None
    p, q = _softmax(site.experts[0].detach()), _softmax(site.base)
    divergence = pairwise_sum(p * torch.log(p / q)).clamp(min=0)
    return divergence.reshape(len(divergence), -1).T if divergence.numel() else divergence.new_zeros(1, len(divergence))


def _softmax(values: Tensor) -> Tensor:
    """Along the last axis, plus 1e-8, in float64 and in a fixed order of additions."""
    if values.numel() == 0:
        return values.double()
    wide = values.double()
    powers = torch.exp(wide - wide.amax(-1, keepdim=True))
    return powers / pairwise_sum(powers).unsqueeze(-1) + 1e-8
