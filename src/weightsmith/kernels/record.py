"""How Python and the machine code talk: numbers of dtypes, sizes, argument lists, and the record of a merge."""

from __future__ import annotations

import numpy as np

__all__ = ["BF16", "CELLS", "E4M3", "E5M2", "F16", "F32", "FILTER", "HIGH", "LOW", "MERGE", "SIGNATURES", "STRIP"]

BF16, F32, F16, E4M3, E5M2 = range(5)
"""How the kernels are told what an array of stored bits holds."""

STRIP = 1 << 11
"""Entries that a kernel works on at once: a few float32 copies of them stay in a core's own cache."""

HIGH, LOW = 1 << 15, 1 << 16
"""Magnitudes have 31 bits, counted in two rounds: by the upper 15, then by the lower 16 within one value of these."""

CELLS = 1 << 12
"""Most counters for a row whose entries are ranked, see `by_rank.sloped`."""

_FILTER = (
    # addresses, 0: none.  cuts: [sides, 3, count] int64; seen: [sides, count] int64; draws: [count, 3] int64
    # kept: [count, entries of the block] bits, packed; factors, shares: [count] float32
    "cuts", "sides", "seen", "draws", "kept", "factors", "shares",
    # how `kept` is found: along an axis so long, whose entries lie so far apart, or by ranks: [count, entries of the
    # tensor] float32; slopes: [count, 2] float32, the probability is slopes[i, 0] + slopes[i, 1] rank
    "columns", "inner", "ranks", "numel", "slopes",
    # or by a vote: the sign where it is even, 1 or -1
    "zero",
)  # fmt: skip

# All fields are 64 bits wide: numba and numpy agree on the layout without padding.
FILTER = np.dtype([(name, np.int64) for name in _FILTER])
"""What a filter does to task vectors, by name: see `filters.filtered`."""

_INTEGERS = (
    # the block: addresses of the inputs' bits and their kinds [count], the base's, the result's; entries
    "inputs", "kinds", "count", "base", "base_kind", "out", "out_kind", "size", "start",
    # address of the FILTERs, in order, and how many
    "filters", "steps",
    # addresses, 0: none.  weights, agree: [count] float32; signs: [1] int64
    "weights", "agree", "signs",
    "vote", "mean", "bare", "k", "scratch",
)  # fmt: skip
_FLOATS = ("zero", "divisor", "scale", "after")

# Integers first: the floats of 4 bytes come last, an even number of them.
MERGE = np.dtype([(name, np.int64) for name in _INTEGERS] + [(name, np.float32) for name in _FLOATS])
"""What merges and looks are told, by name: see `masked_merge` for what each field means."""

SIGNATURES = {
    "weighted_sum": "iiiiiiffiiiii",
    "weighted_sums": "iiiiiiiiiiiii",
    "magnitudes": "iii",
    "count_between": "iiiiii",
    "count_cells": "iiii",
    "masked_merge": "i",
    "row_masses": "iiiiiii",
    "sloped": "iiiii",
    "drawn": "iiii",
    "elected": "iiii",
    "row_products": "iiiiiiiiiii",
    "dots": "iiiiiiiiii",
    "row_sizes": "iiiiiii",
}
"""Kernel -> its arguments: i is a 64-bit integer (or an address), f a float32.  All return a 64-bit integer."""
