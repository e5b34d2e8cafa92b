"""Take over only the changes that stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import at_most, with_base
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Method, Pass, Rows
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.order import Order
from weightsmith.ops.reduce import pairwise_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ArceeFusion"]


@dataclass(frozen=True)
class ArceeFusion(Method, name="arcee_fusion", checks=(at_most(1), with_base)):
    """Take over the changes that stand out.

    Result: base + delta where importance >= median + 1.5 (q3 - q1), all three over the tensor's m importances.
    importance = |delta| KL(softmax(expert) + 1e-8 || softmax(base) + 1e-8), the divergence between slices along the
    last axis.  The quantile q is entry int(q (m - 1)) of the rising order, exact for any size (mergekit samples a
    million entries of larger tensors, at random).  In a vector the divergence is one common factor and is left out.
    """

    paper = "Arcee Fusion (Arcee AI, 2025); as in mergekit"

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        # In this order: an importance is a product with its slice's divergence.
        return DIVERGENCE, IMPORTANCE

    def merge(self, site: Site) -> Tensor:
        # The only list of the pass: [3].
        first, median, third = site.result(IMPORTANCE)[0].tolist()
        kept = _importance(site) >= median + 1.5 * (third - first)
        assert site.base is not None
        return site.base + torch.where(kept, site.deltas[0], 0.0)


@dataclass(frozen=True)
class _Divergence(Pass[Any]):
    """KL divergence of the slices along the last axis: float64 [slices per row, rows]."""

    def applies(self, key: Key) -> bool:
        # A vector is one slice: its divergence multiplies all importances and the threshold alike.
        return len(key.shape) > 1

    def see(self, site: Site) -> State:
        return {"divergence": Rows(_divergence(site).cpu())}


@dataclass(frozen=True)
class _Importance(Order):
    """First quartile, median and third quartile of the importances."""

    def values(self, site: Site) -> Tensor:
        return _importance(site)[None]  # [1, *block]: one list

    def ranks(self, total: int) -> list[int]:
        return [int(q * (total - 1)) for q in (0.25, 0.5, 0.75)]


DIVERGENCE, IMPORTANCE = _Divergence(), _Importance()


def _importance(site: Site) -> Tensor:
    """float32, whose order decides."""
    size = site.deltas[0].detach().abs()  # [*block]
    if len(site.key.shape) < 2:
        return size.float()
    # [slices per row, rows of the block]
    rows = torch.as_tensor(site.result(DIVERGENCE))[..., site.start : site.start + size.shape[0]]
    divergence = rows.T.reshape(size.shape[:-1]).to(size.device)  # [*block without its last axis]
    return (size * divergence.unsqueeze(-1)).float()


def _divergence(site: Site) -> Tensor:
    """Of the slices along the last axis, as many to a row as it has: float64 [slices, rows]."""
    assert site.base is not None
    p, q = _softmax(site.experts[0].detach()), _softmax(site.base)
    # p and q add up to 1 + m 1e-8, not 1, so the sum may be negative by as much.
    divergence = pairwise_sum(p * torch.log(p / q)).clamp(min=0)
    return divergence.reshape(len(divergence), -1).T if divergence.numel() else divergence.new_zeros(1, len(divergence))


def _softmax(values: Tensor) -> Tensor:
    """Along the last axis, plus 1e-8, in float64 and in a fixed order of additions."""
    if values.numel() == 0:
        return values.double()
    wide = values.double()  # float64: the divergence of nearly equal slices is a sum of terms that cancel
    # The largest exponent is 0: no overflow.
    powers = torch.exp(wide - wide.amax(-1, keepdim=True))
    return powers / pairwise_sum(powers).unsqueeze(-1) + 1e-8
