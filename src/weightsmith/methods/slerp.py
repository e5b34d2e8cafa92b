"""Spherical interpolation between two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from weightsmith.core.kernel import Mix
from weightsmith.core.method import number
from weightsmith.ops.gram import Mixture, arc_shares, vector

__all__ = ["Slerp"]

PARALLEL = 0.9995
"""Above this |cosine| the straight line is taken."""


@dataclass(frozen=True)
class Slerp(
    Mixture,
    name="slerp",
    paper="Animating rotation with quaternion curves (Shoemake, 1985); per tensor as in mergekit",
    keeps_expert=False,
    max_count=2,
    scratch=2.0,
    pairs=True,
    cost=3.8,
):
    """Go from one model to another along an arc.

    Result: (sin((1-t) h) a + sin(t h) b) / sin h.
    a is the base and b the expert; without a base, the two experts in order.  h is the angle between the
    tensors as flat vectors, whose lengths are left as they are.  Where |cos h| > 0.9995: (1-t) a + t b.
    The angle is taken in float64 and at any scale; mergekit takes it in float32 and gives vectors shorter
    than 1e-8 no direction.  A vector of zeros stands at a right angle to everything, as there.
    """

    mix: ClassVar[Mix] = Mix(ends=True)

    t: float = number(0.5, "place between the two: 0 the first (the base), 1 the second", low=0, high=1, smooth=True)

    def check(self, count: int, has_base: bool) -> str | None:
        if count + has_base == 2:
            return None
        with_base = "a base and " if has_base else "no base and "
        return f"takes a base and one model, or two models without a base; the recipe has {with_base}{count} models"

    def shares(self, products: Any) -> Any:
        (aa, ab), (_, bb) = products
        return vector(arc_shares(aa, bb, ab, self.t, PARALLEL))
