"""Merge task vectors through orthogonalised singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.lazy import torch
from weightsmith.method import BASE, Each, Grain, Method, Stage, number, registry
from weightsmith.ops.combine import mean, weigh
from weightsmith.ops.spectral import polar, top_svd
from weightsmith.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tsvm"]

NOISE = 1e-6
"""Relative singular values up to which a float32 task vector holds only rounding noise."""


@dataclass(frozen=True)
class Tsvm(
    Method,
    name="tsvm",
    needs=(BASE,),
    paper="Task Singular Vectors (Gargiulo et al., CVPR 2025), arXiv:2412.00081",
    grain=Grain.TENSOR,
    domain=(2, 2),
    otherwise="task_arithmetic",
    symmetric=True,
    scratch=8.0,
):
    """Keep the k leading singular triplets of each of T task vectors and make the bases of all of them orthogonal.

    For matrices m x n with p = min(m, n) and k = p // T: tau_t ~ U_t S_t V_t^T; U = [U_1 .. U_T] and V likewise
    are replaced by their orthogonal polar factors; result: base + scaling U S V^T.  All other tensors, and
    matrices with fewer than T rows or columns, get base + scaling mean_t(tau_t).

    Triplets below 1e-6 of the largest singular value (an expert equal to the base, an adapter of low rank) are
    left out: their directions are rounding noise, but would turn the others (the authors' code keeps them).
    Where columns repeat (equal experts) the polar factor is the pseudo-inverse one.  `scaling` as a list
    multiplies each tau_t before its decomposition.  float64 throughout.
    """

    scaling: Each = number(1.0, "factor of the merged task vector; a list: of each one", each=True)
    rank_fraction: float | str = number(
        "auto",
        "share of singular triplets kept per model; auto: 1 / number of models",
        above=0,
        high=1,
        options=("auto",),
    )

    def elsewhere(self) -> Stage:
        if isinstance(self.scaling, tuple):
            return _task_arithmetic(weight=self.scaling, lambda_=1 / len(self.scaling))
        # normalize turns the sum of weights 1 into the mean
        return _task_arithmetic(lambda_=self.scaling, normalize=True)

    def merge(self, site: Site) -> Tensor:
        before, after = (self.scaling, 1.0) if isinstance(self.scaling, tuple) else (1.0, self.scaling)
        deltas = weigh(site.deltas, site.spread(before))
        assert site.base is not None
        rank = self._rank(min(site.block_shape), site.count)
        merged = mean(deltas) if rank == 0 else _orthogonal_sum(deltas, rank).to(deltas.dtype)
        return site.base + merged * after

    def _rank(self, smaller: int, count: int) -> int:
        if isinstance(self.rank_fraction, str):
            return smaller // count
        return int(smaller * self.rank_fraction + 1e-9)  # 0.1 * 30 is 3, whatever the binary fraction says


def _task_arithmetic(**parameters: Any) -> Stage:
    return registry("task_arithmetic")(**parameters)


def _orthogonal_sum(deltas: Tensor, rank: int) -> Tensor:
    """U S V^T of the deltas' leading triplets, whitened: [T, m, n] -> float64 [m, n]."""
    parts = [top_svd(delta, rank, cutoff=NOISE) for delta in deltas]
    u, s, v = (torch.cat([getattr(p, side) for p in parts], -1) for side in ("u", "s", "v"))
    return (polar(u) * s) @ polar(v).T
