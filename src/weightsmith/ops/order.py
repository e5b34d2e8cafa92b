"""Exact order statistics of signed numbers, over more than memory holds.

The bits of a float32, with those below the sign turned round for negative numbers, are integers in the order of
the numbers.  Counting their upper 16 bits in one measuring round and the lower 16 bits of one bucket in a second
gives any entry of the sorted list exactly (`ops.select` does the same for magnitudes, with ties by index).
Integer arithmetic throughout: the same for every way to cut a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.core.method import Rows
from weightsmith.core.site import Summary
from weightsmith.ops.select import histograms, locate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ROUNDS", "digest", "measure"]

ROUNDS = 2
HALF, SIZE = 1 << 15, 1 << 16

Ranks = Callable[[int], Sequence[int]]
"""Number of entries -> wanted places in the rising order, from 0."""


def measure(stack: Tensor, summary: Summary, round: int) -> dict[str, Tensor | Rows]:
    """Observe one block of n lists, [n, *block], as float32, in round 0 or 1."""
    codes = map(_codes, stack)
    if round == 0:
        return {"order.high": histograms(((c >> 16) + HALF for c in codes), (stack.shape[0], SIZE))}
    buckets = np.asarray(summary["order.bucket"])
    low = (
        c[(c >> 16) + HALF == bucket] & 0xFFFF
        for c, found in zip(codes, buckets.tolist(), strict=True)
        for bucket in found
    )
    return {"order.low": histograms(low, (*buckets.shape, SIZE))}


def digest(totals: Summary, round: int, summary: Summary, ranks: Ranks) -> dict[str, Any]:
    """After round 1: 'order.values', the wanted entries of every list, float64 [n, ranks] (0 for empty lists)."""
    if round == 0:
        high = np.asarray(totals["order.high"])
        total = int(high[0].sum())
        # `locate` counts from the largest, from 1.
        wanted = np.array([total - min(max(rank, 0), max(total - 1, 0)) for rank in ranks(total)], np.int64)
        bucket, left, _ = locate(high, np.broadcast_to(wanted, (high.shape[0], wanted.size)).copy())
        return {**summary, "order.bucket": bucket, "order.left": left, "order.empty": np.asarray(total == 0)}
    low = np.asarray(totals["order.low"])
    place, _, _ = (found[..., 0] for found in locate(low, np.asarray(summary["order.left"])[..., None]))
    codes = (((np.asarray(summary["order.bucket"]) - HALF) << 16) | place).astype(np.int32)
    bits = np.where(codes < 0, codes ^ np.int32(0x7FFFFFFF), codes).astype(np.int32)
    values = np.where(summary["order.empty"], np.float32(0), bits.view(np.float32)).astype(np.float64)
    return {**summary, "order.values": values}


def _codes(values: Tensor) -> Tensor:
    """int32 numbers that are ordered as the float32 numbers are (-0 just below 0)."""
    bits = values.detach().to(torch.float32).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
