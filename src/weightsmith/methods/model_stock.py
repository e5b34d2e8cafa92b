"""How far to go from the base to the mean, told by the angle between the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.kernel import Mix
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Rows, flag
from weightsmith.core.site import Site, Summary
from weightsmith.ops import gram
from weightsmith.ops.combine import mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelStock"]

MIX = Mix(deltas=True)


@dataclass(frozen=True)
class ModelStock(
    Method,
    name="model_stock",
    needs=(BASE,),
    paper="Model Stock (Jang et al., ECCV 2024), arXiv:2403.19522",
    symmetric=True,
    keeps_expert=False,
    min_count=2,
    scratch=4.0,
    pairs=True,
    cost=2.2,
):
    """Go from the base towards the average, as far as the angle between the models says.

    Result: base + t mean_i(delta_i), t = n cos / (1 + (n - 1) cos): models fine-tuned alike lie on a sphere's shell.
    cos is the mean cosine over all pairs of the n task vectors, per tensor; with `filter_wise`, per slice along the
    last axis (a vector is one slice).  A denominator below 1e-6 (task vectors that cancel) gives the base.  float64
    and at any scale: mergekit shrinks the cosine of vectors whose norms multiply to less than 1e-6.  A task vector of
    zeros stands at a right angle to the others.  Orthogonal task vectors give the base.
    """

    filter_wise: bool = flag(False, "one angle per row of the last axis instead of one per tensor")

    @property
    def rounds(self) -> int:
        return 1

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        return self._sliced(key)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        return {} if self._sliced(site.key) else gram.measure(MIX, site)

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Any]:
        if not totals:
            return {}
        found = gram.cosines(gram.products(totals))
        ratio = _ratio(found[np.triu_indices(len(found), 1)])
        return {"mix.shares": np.full(len(found), ratio / len(found))}

    def fused(self, count: int) -> Mix | None:
        return None if self.filter_wise else MIX

    def merge(self, site: Site) -> Tensor:
        if not self._sliced(site.key):
            return gram.mixed(MIX, site)
        assert site.base is not None
        deltas = site.deltas
        return site.base + mean(deltas) * self._by_slice(deltas).to(deltas.dtype)

    def _sliced(self, key: Key) -> bool:
        return self.filter_wise and len(key.shape) > 1

    def _by_slice(self, deltas: Tensor) -> Tensor:
        """t for every slice: [n, *rows, m] -> [*rows, 1]."""
        with torch.no_grad():
            n, wide = deltas.shape[0], deltas.double()
            norms = [gram.last_axis(d, d).sqrt() for d in wide]
            cosines = []
            for i in range(n):
                for j in range(i + 1, n):
                    lengths = norms[i] * norms[j]
                    inner = gram.last_axis(wide[i], wide[j]) / torch.where(lengths > 0, lengths, 1.0)
                    cosines.append(inner.clamp(-1, 1))
            ratios: Tensor = _ratio(torch.stack(cosines)).unsqueeze(-1)
            return ratios


def _ratio(cosines: Any) -> Any:
    """t from the cosines of the n (n - 1) / 2 pairs: [pairs, *] -> [*], a tensor or an array."""
    of: Any = np if isinstance(cosines, np.ndarray) else torch
    n = (1 + int((1 + 8 * cosines.shape[0]) ** 0.5)) // 2
    cosine = mean(cosines)
    divisor = 1 + (n - 1) * cosine
    safe = of.abs(divisor) >= 1e-6
    return of.where(safe, n * cosine / of.where(safe, divisor, 1.0), 0.0)
