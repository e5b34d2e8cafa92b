"""Merge task vectors through orthogonalised singular vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import Case, Verdict, dims, leave
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Factored, choice, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.length import AUTO, Scaled
from weightsmith.ops.spectral import Matrix, matrices, orthogonal_sum, svd_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FEW", "Tsvm"]

FEW = "matrices too small for a triplet of every model"


@dataclass(frozen=True)
class Tsvm(
    Factored, Scaled, name="tsvm", needs=(BASE,), streams=1, checks=(dims(2, 4),), otherwise=scaled_mean, apart=True
):
    """Keep the leading singular directions of every change, and make them orthogonal.

    Kept are k triplets of each of T task vectors.
    For matrices m x n with p = min(m, n) and k = p // T: tau_t ~ U_t S_t V_t^T; U = [U_1 .. U_T] and V likewise
    are replaced by their orthogonal polar factors; result: base + scaling U S V^T.  All other tensors, and
    matrices with fewer than T rows or columns, get base + scaling mean_t(tau_t).

    Triplets below 1e-6 of the largest singular value (an expert equal to the base, an adapter of low rank) are
    left out: their directions are rounding noise, but would turn the others (the authors' code keeps them).
    Where columns repeat (equal experts) the polar factor is the pseudo-inverse one.  `scaling` as a list
    multiplies each tau_t before its decomposition.  Large float32
    matrices are decomposed in float32 (`ops.leading`; a few 1e-4 of the merged task vector), the rest in float64.
    LoRA adapters on the recipe's base are decomposed from their factors, without forming tau_t.

    beyond   what becomes of tensors of three and four dimensions.  mean: as above (the authors' code); slices: each
             matrix of the last two dimensions is merged by itself (experts of a layer in one tensor); flatten: all
             dimensions but the first are joined (kernels of a convolution)
    """

    paper = "Task Singular Vectors (Gargiulo et al., CVPR 2025), arXiv:2412.00081"

    scaling: Each | str = number(
        1.0, "factor of the merged task vector; a list: of each one", each=True, options=(AUTO,), smooth=True
    )
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
    beyond: str = choice("mean", "tensors of more than two dimensions", "mean", "slices", "flatten")

    def check(self, case: Case) -> Iterable[Verdict]:
        if case.key is None:
            return ()
        if len(case.key.shape) > 2 and self.beyond == "mean":
            return leave("tensors of more than two dimensions")
        return leave(None if self._rank(self._smaller(case.key.shape), case.count) else FEW)

    @property
    def shared(self) -> tuple[Tsvm, Any]:
        # A list goes into the task vectors; only one number comes after.
        return (self, 1.0) if isinstance(self.scaling, tuple) else super().shared

    def merged(self, site: Site) -> Tensor:
        assert site.base is not None
        weights = site.spread(self.scaling)  # type: ignore[arg-type]  # of `shared`, which has no auto
        rank = self._rank(self._smaller(site.block_shape), site.count)
        # [T][matrices]: one task vector at a time, of which only the triplets stay.
        tasks = [[svd_of(matrix, rank) for matrix in self._views(tau)] for tau in matrices(site)]
        # A negative singular value is a task vector turned round; a zero one must not turn the others.
        tasks = [[p._replace(s=p.s * w) for p in parts] for parts, w in zip(tasks, weights, strict=True) if w != 0]
        if not tasks:
            return site.base * 0
        # Per matrix, the triplets of all tasks side by side.
        merged = [orthogonal_sum(parts, self.orthogonalise, site.base.dtype) for parts in zip(*tasks, strict=True)]
        whole = merged[0] if len(merged) == 1 else torch.stack(merged)
        return whole.to(site.base.dtype).reshape(site.block_shape)

    def _views(self, tau: Matrix) -> Sequence[Matrix]:
        """The matrices that a task vector consists of."""
        if isinstance(tau, tuple) or tau.ndim == 2:
            return [tau]
        # A kernel [out, in, h, w]: one matrix [out, in h w], or one [h, w] per out and in.
        return [tau.flatten(1)] if self.beyond == "flatten" else tau.flatten(0, -3).unbind()

    def _smaller(self, shape: Sequence[int]) -> int:
        """The smaller side of these matrices."""
        if len(shape) == 2 or self.beyond == "slices":
            return min(shape[-2:])
        # The flattened matrix.
        return min(shape[0], math.prod(shape[1:]))

    def _rank(self, smaller: int, count: int) -> int:
        if isinstance(self.rank_fraction, str):
            return smaller // count  # k T <= min(m, n): the factors can be orthogonal
        return int(smaller * self.rank_fraction + 1e-9)  # 0.1 * 30 is 3, whatever the binary fraction says
