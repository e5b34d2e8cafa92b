"""The mean of models on the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from weightsmith.core.kernel import Mix
from weightsmith.core.method import Each, integer, number
from weightsmith.ops import gram
from weightsmith.ops.combine import spread, usable_weights
from weightsmith.ops.gram import Mixture

__all__ = ["Karcher"]


@dataclass(frozen=True)
class Karcher(Mixture, name="karcher", checks=(usable_weights,)):
    """Average the directions and the lengths of the tensors apart.

    Per tensor: the Karcher mean of the directions x_i / |x_i| times the weighted mean of the lengths |x_i|.
    From m, the normalised mean of the directions u_i, up to `max_iter` steps: m moves to cos|v| m + sin|v| v / |v|
    with v = sum_i a_i h_i / sin h_i (u_i - cos h_i m), h_i the angle between m and u_i; done when |v| < tol.  a_i are
    the weights over their sum, without tensors of zeros, which have no direction.  The base takes no part: list it
    among the models to include it, as mergekit does where it is given.

    Runs in float64 on the inner products of the tensors.  mergekit takes the angles by arccos in float32, which for
    nearly parallel tensors is noise of 3e-4, and drops tensors shorter than `tol`.
    """

    paper = "Riemannian center of mass (Karcher, 1977); as in mergekit"

    mix: ClassVar[Mix] = Mix()

    max_iter: int = integer(10, "most steps", low=0)
    tol: float = number(1e-5, "length of a step, or angle, in radians, that counts as none", above=0)
    weight: Each = number(1.0, "weight of each model", low=0, each=True)

    def shares(self, products: np.ndarray) -> np.ndarray:
        weights, norms = np.array(spread(self.weight, len(products))), np.sqrt(products.diagonal())  # [n]
        # Tensors of zeros have a length, 0, but no direction.
        used = np.where(norms > 0, weights, 0.0)
        if not used.any():
            return used
        # They count in the mean of the lengths.
        length = (weights * norms).sum() / weights.sum()
        direction = self._direction(gram.cosines(products), used / used.sum())
        # Shares of x_i, not of u_i = x_i / |x_i|.
        return np.where(norms > 0, direction * length / np.where(norms > 0, norms, 1.0), 0.0)

    def _direction(self, cosines: np.ndarray, a: np.ndarray) -> np.ndarray:
        """The mean direction as a combination of the u_i: [n, n], n shares of sum 1 -> [n]."""

        def length(c: np.ndarray) -> float:
            # |sum_i c_i u_i|; rounding may make the square negative.
            return math.sqrt(max(float(c @ cosines @ c), 0.0))

        mean = a
        if length(mean) < self.tol:  # the directions cancel
            mean = np.zeros(len(a))
            mean[int((a > 0).argmax())] = 1.0
        # All vectors live in the span of the u_i, as n coefficients: a step costs n^2, whatever the tensor's size.
        mean = mean / length(mean)
        for _ in range(self.max_iter):
            along = (cosines @ mean).clip(-1, 1)  # <u_i, m> = cos h_i: [n]
            angle, sine = np.arccos(along), np.sqrt((1 - along**2).clip(min=0))
            # Parallel ones pull nowhere; opposite ones everywhere, that is nowhere in particular.
            far = np.arcsin(sine) >= self.tol
            pull = np.where(far, a * angle / np.where(far, sine, 1.0), 0.0)
            # v = sum_i a_i h_i / sin h_i (u_i - cos h_i m)
            step = pull - mean * (pull @ along)
            size = length(step)
            if size < self.tol:
                break
            # The exponential map: along the great circle, by the length of the step.
            mean = mean * math.cos(size) + step * (math.sin(size) / size)
            mean = mean / length(mean)
        return mean
