"""Project matrices on a few columns of a fixed basis, chosen by how much of the matrix they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.train.optim.bases import BASES, Kind, basis, dct2, dct3

__all__ = ["Projector", "tall", "working"]


def tall(matrix: Tensor) -> Tensor:
    """A view [longer, shorter] of a matrix: the shorter side is the one that is projected."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def working(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float32, and float64 for float64: moments in bfloat16 would not move at beta2 = 0.999."""
    return dtype if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Projector:
    """Choose `rank` of N orthogonal directions; a cheap stand-in for the SVD of GaLore, FRUGAL or FIRA.

        projector = Projector(rank=64)
        low, columns = projector.choose(gradient)           # gradient [n, N] -> low [n, 64], int64 [64]
        low = projector.down(later_gradient, columns)
        full = projector.up(low, columns, gradient.shape[1])

    rank   directions that are kept, 1 .. N
    basis  "dct3", "dct2" or "random" (`bases.basis`).  The authors' code has the first under `sim_type=matmul` and the
           second under `makhoul`: these are different subspaces, whichever way they are computed
    norm   1 or 2: columns are ranked by this norm of the projected matrix; 2 leaves the least error that `rank` columns
           of this basis can.  -1 or -2 multiply it by the same norm of the basis column
    fft    transform by FFT; False multiplies by the basis (for "random" always)

    Equal norms: the lower column wins.  The chosen columns come in the order in which torch.topk leaves them, which the
    authors' moments depend on; it may differ between devices.  Source: arXiv 2505.17967 and its code (the sheet's
    exception for two shapes of grouped-query attention is an artefact of its single basis and left out).
    """

    rank: int
    basis: Kind = "dct3"
    norm: int = 1
    fft: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise RecipeError(f"rank must be an integer of at least 1, got {self.rank!r}")
        if self.basis not in BASES:
            raise RecipeError(f"unknown basis {self.basis!r}{did_you_mean(str(self.basis), BASES)}")
        if self.norm not in (1, 2, -1, -2):
            raise RecipeError(f"norm must be 1, 2, -1 or -2, got {self.norm!r}")

    def matrix(self, rows: Tensor) -> Tensor:
        """The basis for rows [n, N]: [N, N], of their dtype and on their device."""
        return basis(self.basis, rows.shape[1], rows.dtype, rows.device)

    def transform(self, rows: Tensor) -> Tensor:
        """Coordinates of rows [n, N] in the whole basis: [n, N]."""
        if self.fft and self.basis != "random":
            return dct3(rows) if self.basis == "dct3" else dct2(rows)
        return rows @ self.matrix(rows)

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of rows [n, N] along the leading directions, and those: [n, rank], int64 [rank]."""
        full = self.transform(rows)
        norms = full.abs().sum(0) if abs(self.norm) == 1 else full.square().sum(0).sqrt_()
        if self.norm < 0:
            norms *= torch.linalg.vector_norm(self.matrix(rows), -self.norm, 0)
        # Positions of a stable sort instead of the norms: no ties are left for topk to break as it likes.
        places = torch.empty_like(norms, dtype=torch.int64)
        places[norms.argsort(descending=True, stable=True)] = torch.arange(len(norms), 0, -1, device=norms.device)
        columns = places.topk(self.rank, sorted=False).indices
        return full.index_select(1, columns), columns

    def down(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows [n, N] along chosen directions: [n, rank]."""
        return rows @ self.matrix(rows).index_select(1, columns)

    def add(self, target: Tensor, low: Tensor, columns: Tensor, scale: float) -> None:
        """Add scale times `up` to a matrix, in place: [n, N] or, where it is wide, its transpose."""
        tall = target.shape[0] >= target.shape[1]
        chosen = basis(self.basis, min(target.shape), low.dtype, low.device).index_select(1, columns)
        a, b = (low, chosen.T) if tall else (chosen, low.T)
        if target.dtype == low.dtype:
            target.addmm_(a, b, alpha=scale)
        else:
            target.add_(a @ b, alpha=scale)

    def up(self, low: Tensor, columns: Tensor, size: int) -> Tensor:
        """The matrix [n, size] of coordinates [n, rank] along chosen directions."""
        return low @ basis(self.basis, size, low.dtype, low.device).index_select(1, columns).T
