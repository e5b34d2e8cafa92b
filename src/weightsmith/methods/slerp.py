"""Spherical interpolation between two models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from weightsmith.core.checks import Case, Count, Verdict, refuse
from weightsmith.core.kernel import Mix
from weightsmith.core.method import number
from weightsmith.core.problem import Code
from weightsmith.ops.gram import Mixture, arc_shares, vector

__all__ = ["Slerp"]

PARALLEL = 0.9995
"""Above this |cosine| the straight line is taken."""


@dataclass(frozen=True)
class Ends(Count):
    """Two models with the base, if there is one."""

    def __call__(self, stage: Slerp, case: Case) -> Iterable[Verdict]:
        if case.count + case.has_base == 2:
            return ()
        base = "a base and " if case.has_base else "no base and "
        return refuse(
            f"takes a base and one model, or two models without a base; the recipe has {base}{case.count} models",
            Code.COUNT,
        )


@dataclass(frozen=True)
class Slerp(Mixture, name="slerp", checks=(Ends(high=2),)):
    """Go from one model to another along an arc.

    Result: (sin((1-t) h) a + sin(t h) b) / sin h.
    a is the base and b the expert; without a base, the two experts in order.  h is the angle between the
    tensors as flat vectors, whose lengths are left as they are.  Where |cos h| > 0.9995: (1-t) a + t b.
    The angle is taken in float64 and at any scale; mergekit takes it in float32 and gives vectors shorter
    than 1e-8 no direction.  A vector of zeros stands at a right angle to everything, as there.
    """

    paper = "Animating rotation with quaternion curves (Shoemake, 1985); per tensor as in mergekit"

    mix: ClassVar[Mix] = Mix(ends=True)

    t: float = number(0.5, "place between the two: 0 the first (the base), 1 the second", low=0, high=1, smooth=True)

    def shares(self, products: Any) -> Any:
        # Squared lengths of the two ends and their inner product.
        (aa, ab), (_, bb) = products
        return vector(arc_shares(aa, bb, ab, self.t, PARALLEL))
