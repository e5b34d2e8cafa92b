"""How far to go from the base to the mean, told by the angle between the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weightsmith.core.checks import at_least
from weightsmith.core.kernel import Mix
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, flag
from weightsmith.core.site import Site
from weightsmith.ops.combine import mean
from weightsmith.ops.gram import Mixture, cosines, last_axis

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelStock"]


@dataclass(frozen=True)
class ModelStock(Mixture, name="model_stock", needs=(BASE,), checks=(at_least(2),)):
    """Go from the base towards the average, as far as the angle between the models says.

    Result: base + t mean_i(delta_i), t = n cos / (1 + (n - 1) cos): models fine-tuned alike lie on a sphere's shell.
    cos is the mean cosine over all pairs of the n task vectors, per tensor; with `filter_wise`, per slice along the
    last axis (a vector is one slice).  A denominator below 1e-6 (task vectors that cancel) gives the base.  float64
    and at any scale: mergekit shrinks the cosine of vectors whose norms multiply to less than 1e-6.  A task vector of
    zeros stands at a right angle to the others.  Orthogonal task vectors give the base.
    """

    paper = "Model Stock (Jang et al., ECCV 2024), arXiv:2403.19522"

    mix: ClassVar[Mix] = Mix(deltas=True)

    filter_wise: bool = flag(False, "one angle per row of the last axis instead of one per tensor")

    def shares(self, products: np.ndarray) -> np.ndarray:
        found = cosines(products)
        # The pairs i < j: n (n - 1) / 2 cosines.
        ratio = _ratio(found[np.triu_indices(len(found), 1)])
        # base + t mean(delta) = base + sum_i t / n delta_i
        return np.full(len(found), ratio / len(found))

    def fused(self, count: int) -> Mix | None:
        return None if self.filter_wise else super().fused(count)

    def by_slice(self, site: Site) -> Tensor:
        assert site.base is not None
        deltas = site.deltas
        return site.base + mean(deltas) * self._by_slice(deltas).to(deltas.dtype)

    def sliced(self, key: Key) -> bool:
        return self.filter_wise and len(key.shape) > 1

    def _by_slice(self, deltas: Tensor) -> Tensor:
        """t for every slice: [n, *rows, m] -> [*rows, 1]."""
        with torch.no_grad():
            n, wide = deltas.shape[0], deltas.double()  # float64: angles of nearly parallel slices
            norms = [last_axis(d, d).sqrt() for d in wide]
            angles = []
            for i in range(n):
                for j in range(i + 1, n):
                    lengths = norms[i] * norms[j]
                    # A slice of zeros stands at a right angle to the others.
                    inner = last_axis(wide[i], wide[j]) / torch.where(lengths > 0, lengths, 1.0)
                    angles.append(inner.clamp(-1, 1))
            ratios: Tensor = _ratio(torch.stack(angles)).unsqueeze(-1)
            return ratios


def _ratio(cosines: Any) -> Any:
    """t from the cosines of the n (n - 1) / 2 pairs: [pairs, *] -> [*], a tensor or an array."""
    of: Any = np if isinstance(cosines, np.ndarray) else torch
    # n (n - 1) / 2 = pairs, solved for n.
    n = (1 + int((1 + 8 * cosines.shape[0]) ** 0.5)) // 2
    # The paper assumes equal angles; their mean cosine stands for all.
    cosine = mean(cosines)
    # t = n cos / (1 + (n - 1) cos); the divisor is 0 where the task vectors cancel, and t 0 then.
    divisor = 1 + (n - 1) * cosine
    safe = of.abs(divisor) >= 1e-6
    return of.where(safe, n * cosine / of.where(safe, divisor, 1.0), 0.0)
