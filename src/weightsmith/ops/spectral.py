"""Thin factorisations, in float64 but for large float32 matrices of which only a part is wanted (`ops.leading`).

Gram matrices square the condition number: through A A^T a singular value sigma_i is known to a relative
error of about eps (sigma_1 / sigma_i)^2 with eps = 2e-16, and so is its direction.  Where that would exceed
2e-4 (sigma_i < 1e-6 sigma_1) the functions fall back to an SVD of the matrix itself.

Bytes: BLAS and LAPACK add in an order that may change with their number of threads; runners therefore keep
torch at one thread per task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from weightsmith.core.lazy import torch
from weightsmith.core.site import Site
from weightsmith.ops.leading import LARGE, eigh, gram, leading_space
from weightsmith.ops.polar import on_accelerator, polar_by_products

if TYPE_CHECKING:
    from torch import Tensor

Matrix: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""A matrix [m, n], or (left [m, r], right [r, n]) for their product."""

__all__ = [
    "NOISE",
    "Matrix",
    "Svd",
    "dense",
    "left_basis",
    "low_rank",
    "matrices",
    "orthogonal_sum",
    "outside",
    "padded",
    "polar",
    "polar_by_iteration",
    "polar_of_large",
    "qr_core",
    "svd_of",
    "top_svd",
    "total",
]

RESOLVED = 1e-6
"""Relative singular values down to which the Gram matrix is trusted."""

NOISE = 1e-6
"""Relative singular values up to which a float32 task vector holds only rounding noise."""


MISSED = 1e-2
"""Largest |A v - s u| / s of a triplet found in float32, above which float64 takes over."""

WEAK = 5e-4
"""Eigenvalues of a float32 Gram matrix, relative to the largest, below which it does not settle the directions."""


class Svd(NamedTuple):
    """u [m, k], s [k] falling, v [n, k]: A ~ u diag(s) v^T, float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def product(self) -> Tensor:
        return (self.u * self.s) @ self.v.T


def top_svd(matrix: Tensor, k: int, cutoff: float = 0.0, left: bool = False) -> Svd:
    """The k leading singular triplets of a matrix [m, n], without those of singular value zero.

    Costs an eigendecomposition of the smaller side.  Fewer than k triplets come back from a matrix of
    lower rank: directions of singular values up to `cutoff` (at least max(m, n) eps) times the largest would
    be arbitrary.  For the difference of float32 matrices 1e-6 is a good cutoff: below lies rounding noise.

    left: only u is wanted; v may then come back empty, which saves a product of matrices.

    Of float32 matrices of 256 or more rows and columns up to half of the triplets are found in float32: what a
    triplet misses, |A v - s u|, is then up to 1e-2 s for the weakest ones and far less for the others.
    """
    quick = _top_of_large(matrix, k, cutoff)
    if quick is not None:
        return quick
    # 2^200: squares and sums of them stay within float64's 2^+-1022.
    a, scale = _tamed(matrix.double(), 200)
    if k < 1 or scale == 0:
        return Svd(a.new_zeros(a.shape[0], 0), a.new_zeros(0), a.new_zeros(a.shape[1], 0))
    wide = a.shape[0] <= a.shape[1]
    short = a if wide else a.T  # rows are the smaller side: its Gram matrix [p, p] is the small one
    k = min(k, short.shape[0])
    values, vectors = eigh(gram(short))
    # eigh rises, singular values fall.
    s = values.clamp(min=0).sqrt().flip(0)[:k]
    if s[-1] < RESOLVED * s[0] and cutoff < RESOLVED:
        # Weak directions are wanted, which the squares of the Gram matrix have lost.
        u, s, vt = torch.linalg.svd(short, full_matrices=False)
        rank = int((s[:k] > s[0] * max(cutoff, max(a.shape) * torch.finfo(a.dtype).eps)).sum())
        u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    else:
        rank = int((s > s[0] * cutoff).sum())
        u, s = vectors.flip(1)[:, :rank], s[:rank]
        # A^T u = s v
        v = u.new_zeros(short.shape[1], 0) if left and wide else (short.T @ u) / s
    return Svd(u, s * scale, v) if wide else Svd(v, s * scale, u)


def _tamed(matrix: Tensor, power: int) -> tuple[Tensor, float]:
    """(A / c, c) with c a power of two, 1 where the largest |entry| is within 2^+-power: squares must not vanish.

    c is 0 for a matrix of zeros, or of nothing.  Dividing by c rounds nothing, so the digits do not depend on it.
    """
    if not matrix.numel():
        return matrix, 0.0
    low, high = torch.aminmax(matrix.detach())
    largest = max(-float(low), float(high))
    if largest == 0 or not math.isfinite(largest):
        return matrix, largest
    exponent = math.frexp(largest)[1] - 1
    scale = 1.0 if abs(exponent) <= power else math.ldexp(1.0, exponent)
    return matrix if scale == 1 else matrix / scale, scale


def _top_of_large(matrix: Tensor, k: int, cutoff: float) -> Svd | None:
    """The same of a large float32 matrix, or None where that would not be exact enough."""
    smaller = min(matrix.shape)
    if matrix.dtype != torch.float32 or matrix.requires_grad or smaller < LARGE or not 1 <= k <= smaller // 2:
        return None
    # 2^24: squares and sums of 2^20 of them stay within float32's 2^+-126.
    a, scale = _tamed(matrix, 24)
    if scale == 0:
        return None
    wide = a.shape[0] <= a.shape[1]
    short = a if wide else a.T
    # [p, k + EXTRA], orthonormal: the leading directions and a margin.
    space = leading_space(gram(short), k)
    # A^T restricted to the space, [q, k + EXTRA]; from here on everything is thin, and float64 costs little.
    image = (short.T @ space).double()
    values, turn = eigh(image.T @ image)
    s, turn = values.clamp(min=0).sqrt().flip(0)[:k], turn.flip(1)[:, :k]
    # Rotated within the space onto the singular vectors.
    u, v = space @ turn.float(), image @ (turn / s)
    weak = slice(k // 2, None)  # the strong ones are settled long before
    # v is exact for this u by construction; what u misses shows as |A v - s u|.
    missed = (short @ v[:, weak].float() - u[:, weak] * s[weak].float()).norm(dim=0) / s[weak]
    # Where nothing is left to find (equal singular values, low rank) a Krylov space goes on with rounding noise.
    skew = (space.T @ space - torch.eye(space.shape[1]).to(space)).abs().max()
    # NaN where s is 0: a comparison with it is False.
    if not bool((s[-1] > cutoff * s[0]) & (missed.max() <= MISSED) & (skew <= 1e-4)):
        return None
    u, s = u.double(), s * scale
    return Svd(u, s, v) if wide else Svd(v, s, u)


def padded(found: Svd, k: int) -> Svd:
    """The same with k triplets: those that are missing are zero."""
    missing = k - found.s.shape[0]
    grow = torch.nn.functional.pad
    return Svd(grow(found.u, (0, missing)), grow(found.s, (0, missing)), grow(found.v, (0, missing)))


def low_rank(parts: Mapping[str, Tensor]) -> Tensor:
    """u diag(s) v^T from parts of these names."""
    return (parts["u"] * parts["s"]) @ parts["v"].T


def qr_core(left: Tensor, right: Tensor, k: int | None = None, cutoff: float = 0.0) -> Svd:
    """The SVD of a product left @ right^T, [m, r] and [n, r], without forming it: QR of both, SVD of r x r.

    Singular values up to `cutoff` (at least r eps) times the largest are left out.
    """
    # [m, r] [r, r]: left right^T = Q_l (R_l R_r^T) Q_r^T
    ql, rl = torch.linalg.qr(left.double())
    qr, rr = torch.linalg.qr(right.double())
    u, s, vt = torch.linalg.svd(rl @ rr.T, full_matrices=False)
    k = s.shape[0] if k is None else min(k, s.shape[0])
    if k:
        k = int((s[:k] > s[0] * max(cutoff, s.shape[0] * torch.finfo(s.dtype).eps)).sum())
    return Svd(ql @ u[:, :k], s[:k], qr @ vt[:k].T)


def polar(matrix: Tensor, how: str = "eigh") -> Tensor:
    """The orthogonal polar factor P Q^T of X = P D Q^T, [m, q]: X (X^T X)^(-1/2).

    Directions with D <= 1e-6 of the largest are dropped (a pseudo-inverse root): where columns repeat, as
    with equal experts, the factor is not unique, and theirs is shared out evenly.

    how  eigh (of the Gram matrix where that is exact, else svd), or svd; equal up to rounding.  On an accelerator
         eigh tries products of matrices first (`ops.polar`)
    """
    x = matrix.double()
    if x.numel() == 0:
        return x
    if how == "eigh" and on_accelerator(x) and (quick := polar_by_products(x)) is not None:
        return quick
    if how == "eigh" and x.shape[1] <= x.shape[0]:
        values, vectors = eigh(gram(x.detach().T))
        # D > 1e-4 of the largest: there its square is exact to 2e-8, and X (X^T X)^(-1/2) to as much.
        if values[0] > 1e-8 * values[-1]:
            if x.requires_grad:  # eigenvectors of equal values have no gradient; the factor has one
                return polar_by_iteration(x)
            root: Tensor = (vectors * values.rsqrt()) @ vectors.T
            return x @ root
    p, d, qt = torch.linalg.svd(x, full_matrices=False)
    kept = d > RESOLVED * d[0]
    factor: Tensor = p[:, kept] @ qt[kept]
    return factor


def polar_of_large(matrix: Tensor) -> Tensor:
    """`polar` of a float32 matrix [m, q], q <= m, in float32 where that is exact enough: float32.

    X^T X in float32 leaves the weak directions, D below a fortieth of the largest, mixed with strong ones.  Their
    share of X is therefore cleaned of the strong ones (one Newton step) and decomposed once more, in float64.
    On an accelerator products of matrices are tried first, see `polar`.
    """
    if on_accelerator(matrix) and (quick := polar_by_products(matrix)) is not None:
        return quick.to(matrix.dtype)
    values, vectors = eigh(gram(matrix.T))
    weak = int((values < WEAK * values[-1]).sum())
    # (X^T X)^(-1/2) over the strong directions, as V l^(-1/4) times its transpose: one symmetric product, half the
    # work.
    root = gram(vectors[:, weak:] * values[weak:] ** -0.25)
    factor: Tensor = matrix @ root
    if weak:
        x, right = matrix.double(), vectors[:, :weak].double()
        # The Newton step: root^2 is (X^T X)^-1 over the strong ones, so this takes their share out of the weak ones.
        right -= (root @ (root @ (x.T @ (x @ right)).float())).double()
        left = x @ right
        squares, turn = eigh(left.T @ left)
        # Squares of singular values, so the bound is squared.
        kept = squares > RESOLVED**2 * values[-1]
        turn = turn[:, kept]
        factor = factor + ((left @ (turn * squares[kept].rsqrt())) @ (right @ turn).T).float()
    return factor


def polar_by_iteration(matrix: Tensor, steps: int = 30) -> Tensor:
    """The same factor by Newton-Schulz steps X <- X (15 - 10 X^T X + 3 (X^T X)^2) / 8: products only, in X's dtype.

    A step takes a small singular value to 15/8 of it and converges quadratically near 1; after 30 steps values
    down to 1e-6 of the largest have arrived.  Singular values of zero stay zero.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.T if wide else matrix
    scale = x.norm()
    if scale == 0:
        return matrix
    x = x / scale  # singular values at most 1, where the steps rise
    for _ in range(steps):
        square = x.T @ x
        # 15/8 X - X (10 S - 3 S^2) / 8
        x = torch.addmm(x, x, torch.addmm(square, square, square, beta=10, alpha=-3), beta=15 / 8, alpha=-1 / 8)
    turned: Tensor = x.T
    return turned if wide else x


# --- matrices of a site, dense or as products ------------------------------------------------------


def matrices(site: Site) -> Sequence[Matrix]:
    """The task vectors of a site of matrices, as products where the site has them so; to be walked through."""
    return site.factors or site.tasks


def dense(matrix: Matrix) -> Tensor:
    """The matrix itself."""
    return torch.matmul(*matrix) if isinstance(matrix, tuple) else matrix


def svd_of(matrix: Matrix, k: int, cutoff: float = NOISE) -> Svd:
    """The k leading triplets of a task vector without its rounding noise."""
    if isinstance(matrix, tuple):
        return qr_core(matrix[0], matrix[1].T, k, cutoff)
    return top_svd(matrix, k, cutoff)


def total(found: Sequence[Matrix]) -> Matrix:
    """The sum of all, in float64; of products a product."""
    walk = iter(found)
    first = next(walk)
    if isinstance(first, tuple):
        pairs = [first, *(m for m in walk if isinstance(m, tuple))]
        return torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 0)
    added = first.double()
    for matrix in walk:
        added = added + dense(matrix)
    return added


def outside(matrix: Matrix, basis: Tensor) -> Matrix:
    """The part of a matrix outside the span of orthonormal columns: A - B B^T A, in A's dtype (products: float64)."""
    if isinstance(matrix, tuple):
        left = matrix[0].double()
        return left - basis @ (basis.T @ left), matrix[1]
    wide = matrix.double()
    return (wide - basis @ (basis.T @ wide)).to(matrix.dtype)


def left_basis(found: Sequence[Matrix], cutoff: float = NOISE) -> Tensor:
    """The left singular vectors of [A_1 | ... | A_T], falling singular values: [m, k], float64."""
    blocks = []
    for matrix in found:
        if isinstance(matrix, tuple):
            # right = R^T Q^T with orthonormal Q: left R^T has the same left singular vectors, and r columns only.
            matrix = matrix[0].double() @ torch.linalg.qr(matrix[1].double().T).R.T
        blocks.append(matrix)
    joined = torch.cat(blocks, 1)
    return top_svd(joined, min(joined.shape), cutoff, left=True).u


def orthogonal_sum(parts: Sequence[Svd], how: str = "eigh", dtype: torch.dtype | None = None) -> Tensor:
    """sum_t U_t S_t V_t^T with the bases of all parts made orthogonal to each other: [m, n], float64.

    U = [U_1 .. U_T] and V likewise are replaced by their orthogonal polar factors; how: see `polar`, or none.
    dtype float32: large factors are multiplied in it, and so is the result.
    """
    # [m, k], [k], [n, k] with k the triplets of all parts
    u, s, v = (torch.cat([getattr(p, side) for p in parts], -1) for side in ("u", "s", "v"))
    # Thin and large: what float32 loses is below the noise of float32 task vectors, see `polar_of_large`.
    quick = dtype == torch.float32 and not u.requires_grad and LARGE <= s.shape[0] <= min(u.shape[0], v.shape[0])
    if quick:
        u, s, v = u.float(), s.float(), v.float()
    if quick and how == "eigh":
        u, v = polar_of_large(u), polar_of_large(v)
    elif how != "none":
        u, v = polar(u, how), polar(v, how)
    return Svd(u, s, v).product
