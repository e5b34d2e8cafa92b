"""Merge task vectors through orthogonalised singular vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightsmith.keys import Key
from weightsmith.method import BASE, Each, Grain, Method, Stage, choice, number, registry
from weightsmith.ops.combine import spread
from weightsmith.ops.spectral import matrices, orthogonal_sum, svd_of
from weightsmith.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FEW", "Tsvm", "scaled_mean"]

FEW = "matrices too small for a triplet of every model"


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
    scratch=0.0,
    matrix=2.2,
    square=16.1,
    cost=250.0,
    cubic=True,
    streams=1,
    factored=True,
):
    """Keep the k leading singular triplets of each of T task vectors and make the bases of all of them orthogonal.

    For matrices m x n with p = min(m, n) and k = p // T: tau_t ~ U_t S_t V_t^T; U = [U_1 .. U_T] and V likewise
    are replaced by their orthogonal polar factors; result: base + scaling U S V^T.  All other tensors, and
    matrices with fewer than T rows or columns, get base + scaling mean_t(tau_t).

    Triplets below 1e-6 of the largest singular value (an expert equal to the base, an adapter of low rank) are
    left out: their directions are rounding noise, but would turn the others (the authors' code keeps them).
    Where columns repeat (equal experts) the polar factor is the pseudo-inverse one.  `scaling` as a list
    multiplies each tau_t before its decomposition.  Large float32
    matrices are decomposed in float32 (`ops.leading`; a few 1e-4 of the merged task vector), the rest in float64.
    LoRA adapters on the recipe's base are decomposed from their factors, without forming tau_t.
    """

    scaling: Each = number(1.0, "factor of the merged task vector; a list: of each one", each=True)
    rank_fraction: float | str = number(
        "auto",
        "share of singular triplets kept per model; auto: 1 / number of models",
        above=0,
        high=1,
        options=("auto",),
    )
    orthogonalise: str = choice(
        "eigh", "how the polar factors are found; svd: slower, the same; none: not at all", "eigh", "svd", "none"
    )

    def elsewhere(self) -> Stage:
        return scaled_mean(self.scaling)

    def leaves_out(self, key: Key, count: int) -> str:
        return "" if self._rank(min(key.shape), count) else FEW

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        alike, after = (self, 1.0) if isinstance(self.scaling, tuple) else (replace(self, scaling=1.0), self.scaling)
        return site.base + site.once(alike, lambda: self._merged(site)) * after

    def _merged(self, site: Site) -> Tensor:
        """The merged task vector; multiplied by `scaling` only where that is a list."""
        assert site.base is not None
        weights = spread(self.scaling if isinstance(self.scaling, tuple) else 1.0, site.count)
        rank = self._rank(min(site.block_shape), site.count)
        parts = [svd_of(matrix, rank) for matrix in matrices(site)]
        # A negative singular value is a task vector turned round; a zero one must not turn the others.
        parts = [p._replace(s=p.s * w) for p, w in zip(parts, weights, strict=True) if w != 0]
        merged = orthogonal_sum(parts, self.orthogonalise, site.base.dtype) if parts else site.base * 0
        return merged.to(site.base.dtype)

    def _rank(self, smaller: int, count: int) -> int:
        if isinstance(self.rank_fraction, str):
            return smaller // count
        return int(smaller * self.rank_fraction + 1e-9)  # 0.1 * 30 is 3, whatever the binary fraction says


def scaled_mean(scaling: Each) -> Stage:
    """base + scaling mean_t(tau_t): what the spectral methods do with tensors that are no matrices."""
    parameters: dict[str, Any]
    if isinstance(scaling, tuple):
        parameters = {"weight": scaling, "lambda_": 1 / len(scaling)}
    else:
        parameters = {"lambda_": scaling, "normalize": True}  # the sum of weights 1 becomes the mean
    return registry("task_arithmetic")(**parameters)
