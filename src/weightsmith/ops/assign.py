"""Pairing units of one model with units of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["assigned", "best_pairing", "similarity"]


def similarity(reference: Sequence[Tensor], moving: Sequence[Tensor], *, double: bool = True) -> Tensor:
    """Inner products between units, summed over several tensors: [units, units], float64.

    Each tensor has its units on axis 0; entry (i, j) says how well the moving model's unit j fits position i.
    Without `double` the products of each tensor are in its own dtype, in half the time; their sum never is.
    """
    total: Tensor | None = None  # [units, units]
    for a, b in zip(reference, moving, strict=True):
        # float64 by default: a profit is a sum of thousands of products, and the assignment compares sums of them.
        a, b = (a.double(), b.double()) if double else (a, b)
        part = a.flatten(1) @ b.flatten(1).T if a.ndim > 1 else torch.outer(a, b)
        total = part.double() if total is None else total.add_(part)
        del part  # as large as half the sum
    assert total is not None
    return total


def assigned(profit: np.ndarray, tol: float = 1e-12) -> np.ndarray:
    """The permutation with the largest sum profit[i, order[i]]; the identity unless another gains more than `tol`.

    profit: [units, units] float64, finite.  Its memory is used, and as it was when this returns.  `tol` is relative to
    the largest entry.  Hungarian algorithm of SciPy, O(units^3).
    """
    # Imported here: it takes 35 MB, and no other method needs it.
    from scipy.optimize import linear_sum_assignment

    # order[i] is the unit of the moving model that comes to position i: [units].  `maximize` would make a copy.
    _, order = linear_sum_assignment(np.negative(profit, out=profit))
    np.negative(profit, out=profit)
    # Fine-tunes of one base are aligned already.  Where units are equal SciPy may permute them for a gain of rounding.
    gain = profit[np.arange(len(order)), order].sum() - profit.diagonal().sum()
    largest = max(float(profit.max()), -float(profit.min()), 1e-300)
    return order if gain > tol * largest else np.arange(len(order))


def best_pairing(profit: Tensor, tol: float = 1e-12) -> Tensor:
    """`assigned` of a tensor."""
    return torch.from_numpy(assigned(profit.cpu().numpy(), tol))
