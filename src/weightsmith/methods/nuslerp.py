"""Spherical interpolation between two models by their weights, whole or row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core.checks import exactly
from weightsmith.core.kernel import Mix
from weightsmith.core.keys import Key
from weightsmith.core.method import Each, Grain, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import spread
from weightsmith.ops.gram import Mixture, arc_shares, last_axis, vector

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Nuslerp"]


@dataclass(frozen=True)
class Nuslerp(Mixture, name="nuslerp", checks=(exactly(2),)):
    """Go from one model to another along an arc, by weights, or row by row.

    The way along the arc is t = w_2 / (w_1 + w_2) (1/2 if the sum is below 1e-6):
    (sin((1-t) h) a + sin(t h) b) / sin h.
    a and b are the models or, with a base, their task vectors, to which the base is added again.  h is the angle
    between the tensors as flat vectors; with `flatten: false` between the slices along the last axis (the rows of
    a matrix), with `row_wise` too between those along the first.  Parallel and opposite vectors: (1-t) a + t b.
    float64 and at any scale (mergekit gives vectors shorter than 1e-7 no direction).
    """

    paper = "Animating rotation with quaternion curves (Shoemake, 1985); as mergekit's nuslerp"

    mix: ClassVar[Mix] = Mix(deltas=True)

    weight: Each = number(1.0, "weight of each of the two models", each=True, smooth=True)
    flatten: bool = flag(True, "one angle per tensor")
    row_wise: bool = flag(False, "without flatten: slices along the first axis (mergekit's word for columns)")

    @property  # a constant of the others
    def grain(self) -> Grain:  # type: ignore[override]
        return Grain.TENSOR if self.row_wise and not self.flatten else Grain.ELEMENT

    def shares(self, products: Any) -> Any:
        # The Gram matrix of the two: squared lengths and their inner product.
        (aa, ab), (_, bb) = products
        return vector(arc_shares(aa, bb, ab, self._place))

    def fused(self, count: int) -> Mix | None:
        # The kernels know one angle per tensor.
        return super().fused(count) if self.flatten else None

    def by_slice(self, site: Site) -> Tensor:
        a, b = site.experts if site.base is None else site.deltas  # [*block] each
        aa, bb, ab = (self._along(x.detach(), y.detach()) for x, y in ((a, a), (b, b), (a, b)))
        # Factors of every slice, 1 along the axis that was summed over.
        first, second = (share.to(a.dtype) for share in arc_shares(aa, bb, ab, self._place))
        merged: Tensor = a * first + b * second
        return merged if site.base is None else site.base + merged

    def sliced(self, key: Key) -> bool:
        return not self.flatten and len(key.shape) > 1

    def _along(self, a: Tensor, b: Tensor) -> Tensor:
        if self.row_wise:
            # The slices along the first axis need the whole tensor: see `grain`.
            across: Tensor = last_axis(a.transpose(0, -1), b.transpose(0, -1)).unsqueeze(-1).transpose(0, -1)
            return across
        along: Tensor = last_axis(a, b).unsqueeze(-1)
        return along

    @property
    def _place(self) -> float:
        first, second = spread(self.weight, 2)
        return 0.5 if abs(first + second) < 1e-6 else second / (first + second)
