"""Matching the L1 norm of masked task vectors to that of the whole ones, tensor by tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.core.method import Rows
from weightsmith.core.site import Summary
from weightsmith.ops.reduce import pairwise_sum, row_sizes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["l1_factors", "l1_sums"]

TINY = 1e-7
"""Sums below this are not matched (as in mergekit)."""


def l1_sums(whole: Tensor, masked: Tensor) -> dict[str, Tensor | Rows]:
    """Measure a block of task vectors before and after masking, [n, *block] each."""
    return {
        f"l1.{name}": Rows(torch.stack([row_sizes(d) for d in stack]).cpu())
        for name, stack in (("whole", whole), ("masked", masked))
    }


def l1_factors(totals: Summary) -> dict[str, np.ndarray]:
    """sum |delta| / sum |masked delta| per expert, 1 where either is below 1e-7: 'l1.factors' [n] float64."""
    whole, masked = (pairwise_sum(np.asarray(totals[f"l1.{name}"])) for name in ("whole", "masked"))
    usable = (whole >= TINY) & (masked >= TINY)
    return {"l1.factors": np.where(usable, whole / np.where(usable, masked, 1.0), 1.0)}
