"""Exact order statistics of signed numbers, over more than memory holds.

The bits of a float32, with those below the sign turned round for negative numbers, are integers in the order of
the numbers.  Counting their upper 16 bits in one look and the lower 16 bits of one bucket in a second
gives any entry of the sorted list exactly (`ops.select` does the same for magnitudes, with ties by index).
Integer arithmetic throughout: the same for every way to cut a tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.core.pass_ import Pass, State
from weightsmith.core.site import Site
from weightsmith.kernels.ranks import locate
from weightsmith.ops.select import histograms

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Order"]

HALF, SIZE = 1 << 15, 1 << 16


@dataclass(frozen=True)
class Order(Pass[np.ndarray]):
    """The wanted entries of each of n sorted lists: float64 [n, ranks], 0 for empty lists."""

    @property
    def rounds(self) -> int:
        return 2

    @abstractmethod
    def values(self, site: Site) -> Tensor:
        """n lists of numbers, compared as float32: [n, *block]."""

    @abstractmethod
    def ranks(self, total: int) -> Sequence[int]:
        """The wanted places in the rising order of `total` entries, from 0."""

    def see(self, site: Site) -> State:
        stack = self.values(site)
        # The upper 16 bits of a signed code, moved to 0 .. 65535: int64 [n, 65536].
        return {"high": histograms(((_codes(c) >> 16) + HALF for c in stack), (stack.shape[0], SIZE))}

    def end(self, total: Mapping[str, Any]) -> Pass[np.ndarray]:
        high = np.asarray(total["high"])
        # All lists are equally long: they are entries of the same tensors.
        count = int(high[0].sum())
        # `locate` counts from the largest, from 1.
        wanted = np.array([count - min(max(rank, 0), max(count - 1, 0)) for rank in self.ranks(count)], np.int64)
        bucket, left, _ = locate(high, np.broadcast_to(wanted, (high.shape[0], wanted.size)).copy())
        return _Within(self, bucket, left, count == 0, scope=self.scope)


@dataclass(frozen=True, eq=False)
class _Within(Pass[np.ndarray]):
    """The lower bits within the buckets, int64 [n, ranks]."""

    order: Order
    bucket: np.ndarray
    left: np.ndarray
    empty: bool

    def see(self, site: Site) -> State:
        codes = zip(map(_codes, self.order.values(site)), self.bucket.tolist(), strict=True)
        # [n, ranks, 65536]: within a bucket the lower bits decide.
        low = (c[(c >> 16) + HALF == bucket] & 0xFFFF for c, found in codes for bucket in found)
        return {"low": histograms(low, (*self.bucket.shape, SIZE))}

    def end(self, total: Mapping[str, Any]) -> np.ndarray:
        place, _, _ = (found[..., 0] for found in locate(np.asarray(total["low"]), self.left[..., None]))
        # Bucket and place put together are the code again, and the code the bits of the float32: [n, ranks].
        codes = (((self.bucket - HALF) << 16) | place).astype(np.int32)
        bits = np.where(codes < 0, codes ^ np.int32(0x7FFFFFFF), codes).astype(np.int32)
        return np.where(self.empty, np.float32(0), bits.view(np.float32)).astype(np.float64)

    @property
    def seen(self) -> tuple[Any, ...]:
        return type(self), self.order, self.bucket.tobytes()


def _codes(values: Tensor) -> Tensor:
    """int32 numbers that are ordered as the float32 numbers are (-0 just below 0)."""
    # bits of negative numbers fall as the numbers rise
    bits = values.detach().to(torch.float32).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
