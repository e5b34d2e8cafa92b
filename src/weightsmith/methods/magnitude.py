"""Keep the largest changes of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.kernel import Window
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Pass, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import spread
from weightsmith.ops.rescale import L1, Masking
from weightsmith.ops.select import Largest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Masking, name="magnitude", needs=(BASE,)):
    """Drop the smallest changes of every tensor.

    Kept: exactly the k = max(1, int(density numel)) largest |delta| of each tensor, equals by lower index.
    mergekit's `magnitude` sparsifier; with `rescale`, the survivors are multiplied by
    sum |delta| / sum |kept delta|.  Also the magnitude baseline of the DARE paper (per tensor).
    """

    paper = "TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708, its trim step per tensor"

    density: Each = number(0.5, "share of each tensor's entries kept", above=0, high=1, each=True)
    rescale: bool = flag(False, "keep each tensor's L1 norm")

    def masking(self, count: int) -> tuple[Pass[Any], ...]:
        return (self._cut(count),)

    def fused(self, count: int) -> Window:
        return Window(self._cut(count), L1(self) if self.rescale else None)

    def masked(self, site: Site) -> Tensor:
        deltas = site.deltas
        # Bool [n, *block], exactly max(1, int(density numel)) of the tensor each.
        (kept,) = site.result(self._cut(site.count)).before(deltas, site.start)
        return torch.where(kept, deltas, 0.0)

    def _cut(self, count: int) -> Largest:
        return Largest(densities=spread(self.density, count))
