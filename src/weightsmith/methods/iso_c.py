"""Make all directions of the summed task vector equally strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import dims
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Factored, choice, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.leading import LARGE
from weightsmith.ops.length import AUTO, Scaled
from weightsmith.ops.spectral import NOISE, Matrix, dense, matrices, polar_by_iteration, polar_of_large, svd_of, total

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IsoC"]


@dataclass(frozen=True)
class IsoC(
    Factored, Scaled, name="iso_c", needs=(BASE,), streams=1, checks=(dims(2),), otherwise=scaled_mean, apart=True
):
    """Flatten the singular spectrum of the summed change.

    With sum_t tau_t = U S V^T: base + scaling mean(S) U V^T.
    For matrices; the nuclear norm stays what it was.  All other tensors get base + scaling mean_t(tau_t).
    The mean and U V^T go over the components with s > rank_tol s_1 only: below 1e-6 the directions of float32
    task vectors are rounding noise, which would come out as strong as the rest (the authors' code keeps them:
    rank_tol 0).  1 is not always the best scaling: search 0.5 to 3.  LoRA adapters on the recipe's base are
    decomposed from their factors.

    solver  eigh: in float64, to 4e-5 of the norm also in float32 (float32 matrices from 256 on, rank_tol 1e-6);
            iterate: matrix products only, float32, for GPUs.  Its result differs by up to 1e-4 of the norm, and it
            cannot tell noise from signal: rank_tol has no effect on dense task vectors
    """

    paper = "Iso-C (Marczak et al., ICML 2025), arXiv:2502.04959"

    scaling: float | str = number(1.0, "factor of the flattened task vector", options=(AUTO,), smooth=True)
    rank_tol: float = number(1e-6, "relative singular values up to which a component is left out", low=0, below=1)
    solver: str = choice("eigh", "how the singular directions are found", "eigh", "iterate")

    def merged(self, site: Site) -> Tensor:
        assert site.base is not None
        # The sum, not the mean: the nuclear norm that is kept is that of sum_t tau_t.
        flat = self._flattened(total(matrices(site)), min(site.block_shape, default=0), site.base.dtype)
        return flat.to(site.base.dtype)

    def _flattened(self, added: Matrix, size: int, dtype: torch.dtype) -> Tensor:
        if self.solver == "iterate":
            # float32: products of matrices are what an accelerator is built for.
            matrix = dense(added).float()
            return _even(polar_by_iteration(matrix), matrix)
        small = dtype != torch.float32 or size < LARGE or self.rank_tol != NOISE
        # U V^T alone is the polar factor: no triplets are needed where no component is left out.
        if not (small or isinstance(added, tuple) or added.requires_grad):
            return _by_polar_factor(added)
        u, s, v = svd_of(added, size, self.rank_tol)  # components above rank_tol only: [m, k], [k], [n, k]
        return (u @ v.T) * (s.mean() if s.numel() else torch.zeros(()))


def _by_polar_factor(added: Tensor) -> Tensor:
    """The same of a large matrix through its polar factor U V^T in float32, to about 4e-5 of the norm."""
    scale = added.abs().max()
    if scale == 0:
        return added
    # Entries of at most 1: the squares of tiny task vectors would vanish in float32.
    matrix = (added / scale).float()
    wide = matrix.shape[0] < matrix.shape[1]
    # The smaller side comes last: its Gram matrix is the small one.
    factor = polar_of_large(matrix.T).T if wide else polar_of_large(matrix)
    return _even(factor, matrix) * scale


def _even(factor: Tensor, matrix: Tensor) -> Tensor:
    """The polar factor times the mean singular value: |U V^T|^2 is the rank, <matrix, U V^T> the nuclear norm."""
    # float64 sums of float32 products; the mean goes over the rank, not over min(m, n).
    rank = factor.square().sum(dtype=torch.float64).clamp(min=1)
    return factor * ((matrix * factor).sum(dtype=torch.float64) / rank).to(factor.dtype)
