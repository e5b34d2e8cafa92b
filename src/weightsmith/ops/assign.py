"""Pairing units of one model with units of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["best_pairing", "similarity"]


def similarity(reference: Sequence[Tensor], moving: Sequence[Tensor]) -> Tensor:
    """Inner products between units, summed over several tensors: [units, units], float64.

    Each tensor has its units on axis 0; entry (i, j) says how well the moving model's unit j fits position i.
    """
    total: Tensor | None = None
    for a, b in zip(reference, moving, strict=True):
        part = a.flatten(1).double() @ b.flatten(1).double().T if a.ndim > 1 else torch.outer(a.double(), b.double())
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def best_pairing(profit: Tensor, tol: float = 1e-12) -> Tensor:
    """The permutation with the largest sum profit[i, order[i]]; the identity unless another gains more than `tol`.

    profit: [units, units], finite.  `tol` is relative to the largest entry.  Hungarian algorithm of SciPy, O(units^3).
    """
    from scipy.optimize import linear_sum_assignment

    identity = torch.arange(profit.shape[0])
    _, columns = linear_sum_assignment(profit.cpu().numpy(), maximize=True)
    order = torch.as_tensor(columns)
    gain = profit.cpu()[identity, order].sum() - profit.diagonal().cpu().sum()
    return order if float(gain) > tol * max(float(profit.abs().max()), 1e-300) else identity
