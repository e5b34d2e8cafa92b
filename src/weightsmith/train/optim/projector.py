"""Project matrices on a few columns of a fixed basis, chosen by how much of the matrix they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.train.optim.bases import BASES, Kind, basis, fourier

__all__ = ["Projector", "in_cache", "tall", "working"]


def tall(matrix: Tensor) -> Tensor:
    """A view [longer, shorter] of a matrix: the shorter side is the one that is projected."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def working(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float32, and float64 for float64: moments in bfloat16 would not move at beta2 = 0.999."""
    return dtype if dtype == torch.float64 else torch.float32


def in_cache(rows: Tensor, size: int | None = None) -> Sequence[Tensor]:
    """Rows [n, ...] in blocks that stay in a processor's cache between operations; elsewhere all at once.

    size  entries of a row that count; default: those it has
    """
    if rows.device.type != "cpu":
        return [rows]
    return torch.split(rows, max(1, _BLOCK * torch.get_num_threads() // (size or rows.shape[1])))


_BLOCK = 1 << 17  # entries for each thread: half a megabyte of float32, as much of what comes of it


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
        blocks, places = self._coordinates(rows)
        found = [block if places is None else block.index_select(1, places) for block in blocks]
        return torch.cat(found)

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of rows [n, N] along the leading directions, and those: [n, rank], int64 [rank]."""
        blocks, places = self._coordinates(rows)
        whole, norms = [], torch.zeros((), dtype=rows.dtype, device=rows.device)
        for block in blocks:
            norms = norms + (block.abs() if abs(self.norm) == 1 else block.square()).sum(0)
            whole.append(block)
        if places is not None:
            norms = norms.index_select(0, places)
        if abs(self.norm) == 2:
            norms = norms.sqrt()
        if self.norm < 0:
            norms = norms * torch.linalg.vector_norm(self.matrix(rows), -self.norm, 0)
        # Positions of a stable sort instead of the norms: no ties are left for topk to break as it likes.
        ranks = torch.empty_like(norms, dtype=torch.int64)
        ranks[norms.argsort(descending=True, stable=True)] = torch.arange(len(norms), 0, -1, device=norms.device)
        columns = ranks.topk(self.rank, sorted=False).indices
        taken = columns if places is None else places[columns]
        return torch.cat([block.index_select(1, taken) for block in whole]), columns

    def down(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows [n, N] along chosen directions: [n, rank]."""
        if not self._by_fft(rows.device, len(columns), rows.shape[1]):
            return rows @ self.matrix(rows).T.index_select(0, columns).T
        blocks, places = self._coordinates(rows)
        taken = columns if places is None else places[columns]
        return torch.cat([block.index_select(1, taken) for block in blocks])

    def up(self, low: Tensor, columns: Tensor, size: int) -> Tensor:
        """The matrix [n, size] of coordinates [n, rank] along chosen directions."""
        found = low.new_zeros(len(low), size)
        self._add(found, low, columns, 1.0)
        return found

    def add(self, target: Tensor, low: Tensor, columns: Tensor, scale: float) -> None:
        """Add scale times `up` to a matrix, in place: [n, N] or, where it is wide, its transpose."""
        self._add(tall(target), low, columns, scale)

    def _add(self, target: Tensor, low: Tensor, columns: Tensor, scale: float) -> None:
        size = target.shape[1]
        parts = [*zip(in_cache(target), in_cache(low, size), strict=True)]
        if self._by_fft(low.device, len(columns), size):
            self._add_by_fft(parts, columns, scale)
            return
        chosen = basis(self.basis, size, low.dtype, low.device).T.index_select(0, columns)  # [rank, N]
        for into, block in parts:
            if into.dtype == block.dtype:
                into.addmm_(block, chosen, alpha=scale)
            else:
                _add(into, block @ chosen, scale)

    def _by_fft(self, device: torch.device, rank: int, size: int) -> bool:
        """Whether an FFT is faster than a product with `rank` columns: on a CPU from about 16 log N on (measured)."""
        return self.fft and self.basis != "random" and device.type == "cpu" and rank > 16 * math.log2(size)

    def _add_by_fft(self, parts: Sequence[tuple[Tensor, Tensor]], columns: Tensor, scale: float) -> None:
        """The other basis is the transpose of this one, and reads its entries where this one leaves coordinates."""
        (into, low), *_ = parts
        size, like = into.shape[1], (into.shape[1], low.dtype, low.device)
        slots = fourier(self.basis, *like).places[columns]
        back = fourier("dct2" if self.basis == "dct3" else "dct3", *like)
        entries = low.new_zeros(len(low), len(back.reads))  # each block overwrites the same columns
        for into, low in parts:
            taken = entries[: len(low)].index_copy_(1, slots, low)
            _add(into, back.turned(taken, size).index_select(1, back.places), scale)

    def _coordinates(self, rows: Tensor) -> tuple[Iterable[Tensor], Tensor | None]:
        """Blocks of rows in the whole basis, and where in them each direction stands; None: in its own place."""
        if not self.fft or self.basis == "random":
            return [rows @ self.matrix(rows)], None
        found = fourier(self.basis, rows.shape[1], rows.dtype, rows.device)
        return (found(block) for block in in_cache(rows)), found.places


def _add(into: Tensor, rows: Tensor, scale: float) -> None:
    """Add contiguous rows to a block of a matrix or of the transpose of a wide one, along its memory."""
    if into.stride(1) == 1:
        into.add_(rows, alpha=scale)
    else:
        into.T.add_(rows.T.contiguous(), alpha=scale)
