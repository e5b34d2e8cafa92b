"""Ranks by magnitude from counts of float bits: integers in numpy, the same for torch and for the kernels.

The bits of |x| as float32, read as an integer, are in the order of |x|.  So counting the upper 16 bits in one
pass and the lower 16 bits of one bucket in a second gives the exact k-th largest magnitude with 0.5 MB of state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith.kernels.record import HIGH

__all__ = ["ALL", "EVERYTHING", "NONE", "NOTHING", "buckets", "locate", "thresholds"]

NONE, ALL = HIGH, -1  # buckets that stand for a cut before and after all entries
NOTHING, EVERYTHING = 0x7FFFFFFF, -1  # and thresholds


def locate(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bucket of the rank-th largest entry (from 1), its rank within, and the bucket's size.

    counts: [*, buckets]; ranks: [*, r]; three times [*, r].
    """
    size = counts.shape[-1]
    at_least = counts[..., ::-1].cumsum(-1).reshape(-1, size)  # [j]: entries in bucket size-1-j and above
    # A rank of 0 is before all entries; the caller puts it aside.
    wanted = np.maximum(ranks, 1).reshape(at_least.shape[0], -1)
    # The first bucket from above with at least so many entries in it and above it.
    j = np.stack([np.searchsorted(row, rank) for row, rank in zip(at_least, wanted, strict=True)])
    j = np.minimum(j, size - 1)
    # Entries of that bucket, and of all above it.
    inside = np.take_along_axis(counts.reshape(-1, size), size - 1 - j, -1)
    before_it = np.take_along_axis(at_least, j, -1) - inside
    return (size - 1 - j).reshape(ranks.shape), ranks - before_it.reshape(ranks.shape), inside.reshape(ranks.shape)


def buckets(high: np.ndarray, ranks: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """In which value of the upper bits each cut lies, and at which rank within: int64 [n, cuts] twice.

    high   counts of the upper bits, [n, HIGH]
    ranks  for each of n lists, how many of the largest come before each of its cuts
    """
    wanted = np.array(ranks, np.int64)
    total = high.sum(-1, keepdims=True)
    bucket, left, _ = locate(high, wanted)
    # NONE and ALL lie outside the counted values, so that the next look counts nothing for them.
    return np.where(wanted <= 0, NONE, np.where(wanted >= total, ALL, bucket)), left


def thresholds(
    low: np.ndarray, bucket: np.ndarray, left: np.ndarray, whole: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(threshold, how many of its equals come before the cut, how many equals): int64 [n, cuts] each.

    low           counts of the lower bits within the buckets, [n, cuts, LOW]
    bucket, left  as `buckets` found
    whole         equals at a cut all count as before it
    """
    place, quota, ties = (found[..., 0] for found in locate(low, left[..., None]))
    inside = (bucket != NONE) & (bucket != ALL)
    # Upper and lower bits put together are the magnitude's bits.
    threshold = np.where(inside, (bucket << 16) | place, np.where(bucket == NONE, NOTHING, EVERYTHING))
    ties = np.where(inside, ties, 0)
    return threshold, ties if whole else np.where(inside, quota, 0), ties
