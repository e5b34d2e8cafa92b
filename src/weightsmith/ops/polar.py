"""The orthogonal polar factor by products of matrices alone, which is what accelerators do best.

Newton-Schulz steps of fifth order (Kovarik 1970; Bjorck and Bowie 1971):

    X <- X (15 - 10 S + 3 S^2) / 8,   S = X^T X

turn every singular value s into s (15 - 10 s^2 + 3 s^4) / 8: 15/8 of a small one, quadratic convergence near 1, and 0
stays 0.  An eigendecomposition of S is exact, but slow on GPUs: it is sequential.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["on_accelerator", "polar_by_products"]

GROWTH = 15 / 8
"""What a step makes of a small singular value."""

WEAKEST = 1e-5
"""Relative singular values down to which the steps are carried on; weaker ones are left to a decomposition."""


def on_accelerator(matrix: Tensor) -> bool:
    """Whether products are so much cheaper than decompositions that it pays to try without."""
    return matrix.device.type != "cpu"


def polar_by_products(matrix: Tensor) -> Tensor | None:
    """The polar factor P Q^T of X = P D Q^T, [m, n], float64; None where products cannot settle it.

    Settled is a factor whose S is a projector, |S S - S|_F <= max(1e-12, 8 eps k) with k = min(m, n): every direction
    has arrived at 1, or is as good as zero.  The decomposition drops directions up to 1e-6 of the strongest.  Those
    from 1e-6 to 1e-5 do not arrive within the steps that are made, and weaker ones are never made strong.  So what
    is returned agrees with it to 1e-11 of the norm, or to 2e-6 where weak directions are dropped.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    # The smaller side k gives S [k, k]; the factor of the transpose is the transpose.
    x = (matrix if tall else matrix.T).double()
    size = x.shape[1]
    norm = torch.linalg.vector_norm(x)
    if not size or norm == 0:
        return None
    x = x / norm  # the strongest is now at least 1 / sqrt(size)
    root = math.sqrt(size)
    least = math.ceil(math.log(10 * root, GROWTH))  # a direction of 1e-6 is 1e-5 then, and seen in S
    most = math.ceil(math.log(root / WEAKEST, GROWTH)) + 3
    enough = max(1e-12, 8 * torch.finfo(torch.float64).eps * size)
    for step in range(most + 1):
        square = x.T @ x
        # S^2; where all singular values are 0 or 1 it is S.
        fourth = square @ square
        if step >= least and float(torch.linalg.vector_norm(fourth - square)) <= enough:
            found: Tensor = x if tall else x.T
            return found
        # 15/8 X + X (3 S^2 - 10 S) / 8
        x = torch.addmm(x, x, torch.add(fourth * 3, square, alpha=-10), beta=15 / 8, alpha=1 / 8)
    return None
