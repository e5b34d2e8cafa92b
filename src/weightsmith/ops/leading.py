"""The strongest singular directions of a large float32 matrix, without decomposing all of it.

A decomposition of a p x p Gram matrix spends its time on turning the matrix into a tridiagonal one, column by
column.  Where only k of p directions are wanted, a block Krylov space (Golub and Underwood, 1977) finds them by
products of matrices, which run several times faster.  It is built until the wanted directions leave a residual
|G w - theta w| <= RESIDUAL theta; where that takes too long (spectra without decay) the Gram matrix is decomposed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch
from weightsmith.ops.noise import uniform_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGE", "eigh", "gram", "leading_space"]

LARGE = 256
"""Smaller side from which on float32 and approximations pay; below, everything is float64 and exact."""

RESIDUAL = 5e-4
"""Relative residual of the weakest direction wanted, at which the space is large enough."""

FIRST = 17 / 6
"""Columns of a Krylov space, relative to those wanted, at the first look at its residual: at 768 x 768 and k = 96 a
block more than is needed at best, which costs 0.5 ms, where a second look costs 5."""

SETTLING = 0.1
"""Relative residual at the first look, above which a Krylov space would grow too large."""

FALL = 5.0
"""By how much a further block usually lowers the residual: no decomposition before it may be low enough."""

WIDTH = 16
"""Columns of a block.  Narrow ones reach a higher power of the matrix with the same number of columns: at 768 x 768
and k = 96 a space of 256 is enough, and takes 27 ms; blocks of 32 columns take 320 and 42 ms, of 64 384 and 42 ms."""

EXTRA = 16
"""Directions handed out beyond those wanted: their last ones are the least settled."""

STEP = 128
"""Rows of a block of a Gram matrix."""


def gram(rows: Tensor) -> Tensor:
    """A A^T [p, p] of A [p, q], in A's dtype: the blocks above the diagonal are copied, which saves half."""
    size = rows.shape[0]
    # 128 rows at a time keep the products large enough for BLAS, and waste at most 128 columns beyond the diagonal.
    out = rows.new_empty(size, size)
    for low in range(0, size, STEP):
        high = min(low + STEP, size)
        out[low:high, :high] = rows[low:high] @ rows[:high].T
        # Copied, so the matrix is symmetric to the bit, which eigh takes for granted.
        out[:low, low:high] = out[low:high, :low].T
    return out


def eigh(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of a symmetric matrix, in its dtype.

    LAPACK's float32 routine gives up on matrices with many rows of zeros among strong and weak ones (the change of an
    embedding of which few tokens were seen); they are decomposed in float64 then, which takes twice the time.
    """
    try:
        found = torch.linalg.eigh(square)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if square.dtype == torch.float64:
            raise
        found = torch.linalg.eigh(square.double())
    return found.eigenvalues.to(square.dtype), found.eigenvectors.to(square.dtype)


def leading_space(square: Tensor, k: int) -> Tensor:
    """Orthonormal columns [p, k + EXTRA] that hold the k leading eigenvectors of a Gram matrix [p, p], float32.

    As exact as float32 allows where the eigenvalues are above about 1e-6 of the largest; callers check what they
    make of it.
    """
    size = square.shape[0]
    # A space of 4 k columns is decomposed as well: beyond k = p / 5 that costs what it saves.
    found = _krylov(square, k) if 5 * k <= size else None
    return eigh(square)[1][:, -min(k + EXTRA, size) :] if found is None else found


def _krylov(square: Tensor, k: int) -> Tensor | None:
    """Rayleigh-Ritz vectors of the space spanned by G X, G^2 X, ...; None if 4 k columns of it are not enough."""
    # G is `square`, [p, p]; theta and w are Ritz values and vectors.
    size, most = square.shape[0], 4 * k + 2 * WIDTH
    if size < most + WIDTH:
        return None
    basis, image = square.new_empty(most, size), square.new_empty(most, size)  # vectors as rows: parts are contiguous
    # [WIDTH, p], orthonormal.  The random start is multiplied once: its weak directions are noise.
    block = torch.linalg.qr(square @ _start(square)).Q.T
    filled, look = 0, int(FIRST * k)
    while filled + WIDTH <= most:
        here = slice(filled, filled + WIDTH)
        basis[here] = block
        image[here] = block @ square  # G is symmetric: rows times G are (G x columns)^T
        filled = here.stop
        known, rest = basis[:filled], image[here]
        # Nearly all of the image lies in the last two blocks; then comes what rounding took from the strong directions.
        for near in (basis[max(filled - 2 * WIDTH, 0) : filled], known):
            rest = rest - (rest @ near.T) @ near
        # What is left of the image, made orthonormal, is the next block; the coupling [WIDTH, WIDTH] tells how much it
        # is.
        block, coupling = (part.T for part in torch.linalg.qr(rest.T))
        if filled >= look:
            # Rayleigh-Ritz: G within the space, [filled, filled].
            values, vectors = eigh(image[:filled] @ known.T)
            # G w - theta w lies in the next block alone: the coupling times the last WIDTH coordinates of w.
            missed = float(((coupling.T @ vectors[-WIDTH:, -k:]).norm(dim=0) / values[-k:]).max())
            if missed <= RESIDUAL:
                found: Tensor = known.T @ vectors[:, -(k + EXTRA) :]
                return found
            # Written so that NaN leaves as well.
            if not missed <= SETTLING:
                return None  # the spectrum hardly falls: most of the directions would be needed
            look = filled + WIDTH * max(1, int(math.log(missed / RESIDUAL, FALL)))
    return None


def _start(like: Tensor) -> Tensor:
    """Random signs [p, WIDTH], always the same."""
    # the stream of no tensor: the same start for all
    bits = uniform_bits(0, "", "", "leading", 0, like.shape[0] * WIDTH)
    signs = (bits & 1).astype("float32") * 2 - 1
    return torch.from_numpy(signs).reshape(-1, WIDTH).to(like)
