"""Thin factorisations in float64.

Gram matrices square the condition number: through A A^T a singular value sigma_i is known to a relative
error of about eps (sigma_1 / sigma_i)^2 with eps = 2e-16, and so is its direction.  Where that would exceed
2e-4 (sigma_i < 1e-6 sigma_1) the functions fall back to an SVD of the matrix itself.

Bytes: BLAS and LAPACK add in an order that may change with their number of threads; runners therefore keep
torch at one thread per task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightsmith.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Svd", "polar", "qr_core", "top_svd"]

RESOLVED = 1e-6
"""Relative singular values down to which the Gram matrix is trusted."""


class Svd(NamedTuple):
    """u [m, k], s [k] falling, v [n, k]: A ~ u diag(s) v^T, float64."""

    u: Tensor
    s: Tensor
    v: Tensor


def top_svd(matrix: Tensor, k: int, cutoff: float = 0.0) -> Svd:
    """The k leading singular triplets of a matrix [m, n], without those of singular value zero.

    Costs an eigendecomposition of the smaller side.  Fewer than k triplets come back from a matrix of
    lower rank: directions of singular values up to `cutoff` (at least max(m, n) eps) times the largest would
    be arbitrary.  For the difference of float32 matrices 1e-6 is a good cutoff: below lies rounding noise.
    """
    a = matrix.double()
    scale = a.abs().max() if a.numel() else a.new_zeros(())
    if k < 1 or scale == 0:
        return Svd(a.new_zeros(a.shape[0], 0), a.new_zeros(0), a.new_zeros(a.shape[1], 0))
    a = a / scale  # 1e-200 squared would vanish
    wide = a.shape[0] <= a.shape[1]
    short = a if wide else a.T
    k = min(k, short.shape[0])
    values, vectors = torch.linalg.eigh(short @ short.T)
    s = values.clamp(min=0).sqrt().flip(0)[:k]
    if s[-1] < RESOLVED * s[0] and cutoff < RESOLVED:
        u, s, vt = torch.linalg.svd(short, full_matrices=False)
        rank = int((s[:k] > s[0] * max(cutoff, max(a.shape) * torch.finfo(a.dtype).eps)).sum())
        u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    else:
        rank = int((s > s[0] * cutoff).sum())
        u, s = vectors.flip(1)[:, :rank], s[:rank]
        v = (short.T @ u) / s
    return Svd(u, s * scale, v) if wide else Svd(v, s * scale, u)


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor P Q^T of X = P D Q^T, [m, q]: X (X^T X)^(-1/2).

    Directions with D <= 1e-6 of the largest are dropped (a pseudo-inverse root): where columns repeat, as
    with equal experts, the factor is not unique, and theirs is shared out evenly.
    """
    x = matrix.double()
    if x.numel() == 0:
        return x
    if x.shape[1] <= x.shape[0]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        if values[0] > 1e-8 * values[-1]:
            root: Tensor = (vectors * values.rsqrt()) @ vectors.T
            return x @ root
    p, d, qt = torch.linalg.svd(x, full_matrices=False)
    kept = d > RESOLVED * d[0]
    factor: Tensor = p[:, kept] @ qt[kept]
    return factor


def qr_core(left: Tensor, right: Tensor, k: int | None = None) -> Svd:
    """The SVD of a product left @ right^T, [m, r] and [n, r], without forming it: QR of both, SVD of r x r."""
    ql, rl = torch.linalg.qr(left.double())
    qr, rr = torch.linalg.qr(right.double())
    u, s, vt = torch.linalg.svd(rl @ rr.T, full_matrices=False)
    k = s.shape[0] if k is None else min(k, s.shape[0])
    return Svd(ql @ u[:, :k], s[:k], qr @ vt[:k].T)
