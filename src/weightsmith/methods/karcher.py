"""The mean of models on the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.method import Each, Method, Rows, integer, number
from weightsmith.ops import gram
from weightsmith.ops.combine import spread, unusable_weights, weighted_sum
from weightsmith.site import Site, Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Karcher"]


@dataclass(frozen=True)
class Karcher(
    Method,
    name="karcher",
    paper="Riemannian center of mass (Karcher, 1977); as in mergekit",
    symmetric=True,
    scratch=3.0,
    cost=8.0,
):
    """Per tensor: the Karcher mean of the directions x_i / |x_i| times the weighted mean of the lengths |x_i|.

    From m, the normalised mean of the directions u_i, up to `max_iter` steps: m moves to cos|v| m + sin|v| v / |v|
    with v = sum_i a_i h_i / sin h_i (u_i - cos h_i m), h_i the angle between m and u_i; done when |v| < tol.  a_i are
    the weights over their sum, without tensors of zeros, which have no direction.  The base takes no part: list it
    among the models to include it, as mergekit does where it is given.

    Runs in float64 on the inner products of the tensors.  mergekit takes the angles by arccos in float32, which for
    nearly parallel tensors is noise of 3e-4, and drops tensors shorter than `tol`.
    """

    max_iter: int = integer(10, "most steps", low=0)
    tol: float = number(1e-5, "length of a step, or angle, in radians, that counts as none", above=0)
    weight: Each = number(1.0, "weight of each model", low=0, each=True)

    @property
    def rounds(self) -> int:
        return 1

    def check(self, count: int, has_base: bool) -> str | None:
        return unusable_weights(spread(self.weight, count), True)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        return gram.measure(site.experts)

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Tensor]:
        return gram.products(totals)

    def merge(self, site: Site) -> Tensor:
        weights = site.spread(self.weight)
        norms = site.summary["gram"].diagonal().sqrt().tolist()
        length = sum(w * norm for w, norm in zip(weights, norms, strict=True)) / sum(weights)
        used = [w if norm > 0 else 0.0 for w, norm in zip(weights, norms, strict=True)]
        if sum(used) == 0:
            return site.experts[0] * 0.0
        direction = self._direction(gram.cosines(site.summary["gram"]), [w / sum(used) for w in used])
        factors = [c * length / norm if norm > 0 else 0.0 for c, norm in zip(direction.tolist(), norms, strict=True)]
        return weighted_sum(site.experts, factors)

    def _direction(self, cosines: Tensor, shares: Sequence[float]) -> Tensor:
        """The mean direction as a combination of the u_i: [n, n], n shares of sum 1 -> [n]."""
        a = cosines.new_tensor(shares)
        units = a.new_tensor([float(share > 0) for share in shares])

        def length(c: Tensor) -> Tensor:
            return (c @ cosines @ c).clamp(min=0).sqrt()

        mean = a
        if length(mean) < self.tol:  # the directions cancel
            mean = a.new_zeros(len(a))
            mean[int(units.argmax())] = 1.0
        mean = mean / length(mean)
        for _ in range(self.max_iter):
            along = (cosines @ mean).clamp(-1, 1)
            angle, sine = along.acos(), (1 - along.square()).clamp(min=0).sqrt()
            # Parallel ones pull nowhere; opposite ones everywhere, that is nowhere in particular.
            pull = (a * angle / sine).where(sine.asin() >= self.tol, 0.0)
            step = pull - mean * (pull @ along)
            size = length(step)
            if size < self.tol:
                break
            mean = mean * size.cos() + step * (size.sin() / size)
            mean = mean / length(mean)
        return mean
