"""How the singular vectors of two matrices lie to each other (arXiv:2402.04051)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOP", "alignment"]

TOP = 0.3
"""Singular values from this share of the largest on count."""


def alignment(a: Tensor, b: Tensor, top: float = TOP) -> float:
    """R = sum over pairs of large singular values of (u_i^A . u_j^B)(v_i^A . v_j^B), divided by their number.

    a, b: [out, in] float.  1 where the leading subspaces and their pairing are the same, about 0 for unrelated
    matrices.  Of a and b the larger number of large values divides, so that neither way round gains; the paper's own
    constant is not verified.  Permuting rows or columns of b changes R and no singular value.
    """
    left, right = (_leading(matrix.double(), top) for matrix in (a, b))
    if left is None or right is None:
        return 0.0
    products = (left[0].T @ right[0]) * (left[1] @ right[1].T)
    return float(products.sum()) / max(products.shape)


def _leading(matrix: Tensor, top: float) -> tuple[Tensor, Tensor] | None:
    """Left vectors [out, k] and right vectors [k, in] of the large singular values; None of a matrix of zeros."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if not float(s[0]):
        return None
    large = s >= top * s[0]
    return u[:, large], v[large]
