"""How far to go from the base to the mean, told by the angle between the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.keys import Key
from weightsmith.lazy import torch
from weightsmith.method import BASE, Method, Rows, flag
from weightsmith.ops import gram
from weightsmith.ops.combine import mean
from weightsmith.site import Site, Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelStock"]


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
    cost=10.0,
):
    """base + t mean_i(delta_i) with t = n cos / (1 + (n - 1) cos): models fine-tuned alike lie on a sphere's shell.

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
        return {} if self._sliced(site.key) else gram.measure(site.deltas)

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Tensor]:
        if not totals:
            return {}
        found = gram.products(totals)["gram"]
        return {"model_stock.ratio": _ratio(gram.cosines(found)[*torch.triu_indices(len(found), len(found), 1)])}

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        deltas = site.deltas
        ratio = self._by_slice(deltas).to(deltas.dtype) if self._sliced(site.key) else self._whole(site)
        return site.base + mean(deltas) * ratio

    def _sliced(self, key: Key) -> bool:
        return self.filter_wise and len(key.shape) > 1

    def _whole(self, site: Site) -> float:
        return float(site.summary["model_stock.ratio"])

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
            return _ratio(torch.stack(cosines)).unsqueeze(-1)


def _ratio(cosines: Tensor) -> Tensor:
    """t from the cosines of the n (n - 1) / 2 pairs: [pairs, *] -> [*]."""
    n = (1 + int((1 + 8 * cosines.shape[0]) ** 0.5)) // 2
    cosine = mean(cosines)
    divisor = 1 + (n - 1) * cosine
    safe = divisor.abs() >= 1e-6
    return torch.where(safe, n * cosine / torch.where(safe, divisor, 1.0), 0.0)
