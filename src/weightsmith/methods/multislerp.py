"""The mean direction of several models at their mean length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from weightsmith.core.kernel import Mix
from weightsmith.core.method import Each, flag, number
from weightsmith.core.parameter import is_tensor
from weightsmith.ops.combine import shown_shares, spread, usable_weights
from weightsmith.ops.gram import Mixture, vector

__all__ = ["Multislerp"]


NOISE = 1e-7
"""Length of a sum of unit vectors below which its direction is rounding noise of float32 inputs."""


@dataclass(frozen=True)
class Multislerp(Mixture, name="multislerp", checks=(usable_weights, shown_shares)):
    """Average the directions of the tensors, and give the result their mean length.

    Per tensor, x_i the models or, with a base, the task vectors: m = sum_i w_i x_i / (|x_i| + eps); the result is
    m / |m| sum_i w_i |x_i|, plus the base.
    mergekit goes on to a step in the tangent space at m, which is zero but for rounding: sum_i w_i u_i is m itself,
    so that its part across m vanishes, and only a factor cos(eps) is left.  Where |m| < eps or 1e-7 (models that
    cancel, or all but zero) there is no direction: sum_i w_i x_i; mergekit refuses that for more than two models.
    One model comes back as it is.
    """

    paper = "Multi-SLERP (Goddard, 2024), barycentric on the sphere; as in mergekit"

    mix: ClassVar[Mix] = Mix(deltas=True)

    weight: Each = number(1.0, "weight of each model", each=True, smooth=True)
    normalize: bool = flag(True, "divide the weights by their sum (normalize_weights)")
    eps: float = number(1e-8, "what is added to lengths, and the shortest sum that has a direction", low=0)

    def shares(self, products: Any) -> Any:
        if len(products) == 1:
            return np.ones(1)
        weights = list(spread(self.weight, len(products)))
        if self.normalize:
            weights = [w / sum(weights) for w in weights]
        norms = [math.sqrt(square) for square in products.diagonal().tolist()]  # |x_i|
        # w_i x_i / |x_i|, as factors of x_i
        shares = [w / (norm + self.eps) if norm > 0 else 0.0 for w, norm in zip(weights, norms, strict=True)]
        along = vector(shares)
        # |sum_i w_i x_i / |x_i||^2 from the inner products alone.
        square = along @ products @ along
        length = square.clamp(min=0).sqrt() if is_tensor(square) else math.sqrt(max(float(square), 0.0))
        if length < self.eps or length <= NOISE * sum(map(abs, weights)):
            # The directions cancel: no mean on the sphere, so the plain weighted sum.
            return vector(weights)
        # The length of the result, mergekit's: the weighted mean of the lengths, times cos(eps) of its exponential map.
        reach = sum(w * norm for w, norm in zip(weights, norms, strict=True)) * math.cos(self.eps)
        return vector([share / length * reach for share in shares])
