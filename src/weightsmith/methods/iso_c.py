"""Make all directions of the summed task vector equally strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.lazy import torch
from weightsmith.method import BASE, Grain, Method, Stage, choice, number
from weightsmith.methods.tsvm import scaled_mean
from weightsmith.ops.spectral import Matrix, dense, matrices, polar_by_iteration, svd_of, total
from weightsmith.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IsoC"]


@dataclass(frozen=True)
class IsoC(
    Method,
    name="iso_c",
    needs=(BASE,),
    paper="Iso-C (Marczak et al., ICML 2025), arXiv:2502.04959",
    grain=Grain.TENSOR,
    domain=(2, 2),
    otherwise="task_arithmetic",
    symmetric=True,
    keeps_expert=False,
    scratch=8.0,
    cost=75.0,
    cubic=True,
    factored=True,
):
    """Flatten the singular spectrum of sum_t tau_t = U S V^T: base + scaling mean(S) U V^T.

    For matrices; the nuclear norm stays what it was.  All other tensors get base + scaling mean_t(tau_t).
    The mean and U V^T go over the components with s > rank_tol s_1 only: below 1e-6 the directions of float32
    task vectors are rounding noise, which would come out as strong as the rest (the authors' code keeps them:
    rank_tol 0).  1 is not always the best scaling: search 0.5 to 3.  LoRA adapters on the recipe's base are
    decomposed from their factors.

    solver  eigh: exact, float64; iterate: matrix products only, float32, for GPUs.  Its result differs by up to
            1e-4 of the norm, and it cannot tell noise from signal: rank_tol has no effect on dense task vectors
    """

    scaling: float = number(1.0, "factor of the flattened task vector")
    rank_tol: float = number(1e-6, "relative singular values up to which a component is left out", low=0, below=1)
    solver: str = choice("eigh", "how the singular directions are found", "eigh", "iterate")

    def elsewhere(self) -> Stage:
        return scaled_mean(self.scaling)

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        flat = self._flattened(total(matrices(site)), min(site.block_shape, default=0))
        return site.base + flat.to(site.base.dtype) * self.scaling

    def _flattened(self, added: Matrix, size: int) -> Tensor:
        if self.solver == "iterate":
            matrix = dense(added).float()
            factor = polar_by_iteration(matrix)
            # |U V^T|^2 is the rank, and <Delta, U V^T> the nuclear norm.
            rank = factor.square().sum().clamp(min=1)
            return factor * ((matrix * factor).sum() / rank)
        u, s, v = svd_of(added, size, self.rank_tol)
        return (u @ v.T) * (s.mean() if s.numel() else torch.zeros(()))
