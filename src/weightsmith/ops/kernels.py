"""The compiled loops behind `ops.fused`.  Importing this compiles them, or loads them from numba's cache.

Signatures are given, so that compiling happens here and never in the middle of a merge.  `fastmath` stays off
and products are not fused with sums: the same bytes as torch is the point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

_U2, _U4, _F4 = types.uint16[::1], types.uint32[::1], types.float32[::1]
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
_BITS = (_U2, _U4)


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(typing: Any, value: Any) -> Any:
    """Reinterpret uint32 bits as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(typing: Any, value: Any) -> Any:
    """Reinterpret a float32 as uint32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@njit([types.void(b, _F4) for b in _BITS], **_OPTIONS)  # type: ignore[untyped-decorator]
def decode(bits: Any, out: Any) -> None:
    """Stored bits (uint16: bfloat16, uint32: float32) -> float32."""
    shift = np.uint32(16 if bits.itemsize == 2 else 0)
    for i in range(bits.size):
        out[i] = _as_float(np.uint32(bits[i]) << shift)


@njit([types.void(_F4, b, _F4, types.float32, types.boolean, types.boolean) for b in _BITS], **_OPTIONS)  # type: ignore[untyped-decorator]
def accumulate(acc: Any, bits: Any, base: Any, weight: Any, first: Any, deltas: Any) -> None:
    """acc (+)= weight * x, or weight * (x - base)."""
    shift = np.uint32(16 if bits.itemsize == 2 else 0)
    # Four plain loops: a condition inside one would keep it from being vectorised.
    if deltas and first:
        for i in range(acc.size):
            acc[i] = (_as_float(np.uint32(bits[i]) << shift) - base[i]) * weight
    elif deltas:
        for i in range(acc.size):
            acc[i] += (_as_float(np.uint32(bits[i]) << shift) - base[i]) * weight
    elif first:
        for i in range(acc.size):
            acc[i] = _as_float(np.uint32(bits[i]) << shift) * weight
    else:
        for i in range(acc.size):
            acc[i] += _as_float(np.uint32(bits[i]) << shift) * weight


@njit([types.int64(_F4, _F4, types.float32, types.float32, types.boolean, b) for b in _BITS], **_OPTIONS)  # type: ignore[untyped-decorator]
def finish(acc: Any, base: Any, divisor: Any, scale: Any, deltas: Any, out: Any) -> Any:
    """Divide, scale, add the base, encode; return how many results are NaN or Inf."""
    if divisor != np.float32(1):
        for i in range(acc.size):
            acc[i] = acc[i] / divisor
    if deltas:
        for i in range(acc.size):
            acc[i] = base[i] + acc[i] * scale
    exponent = np.uint32(0x7F800000)
    bad = np.uint32(0)
    if out.itemsize == 4:
        for i in range(acc.size):
            bits = _as_bits(acc[i])
            out[i] = bits
            bad += np.uint32((bits & exponent) == exponent)
    else:
        for i in range(acc.size):
            bits = _as_bits(acc[i])
            # Round to nearest, ties to even; a NaN becomes the quiet NaN that torch writes.
            nan = (bits & np.uint32(0x7FFFFFFF)) > exponent
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            kept = np.uint32(0x7FC00000) if nan else rounded
            out[i] = np.uint16(kept >> np.uint32(16))
            bad += np.uint32((kept & exponent) == exponent)
    return np.int64(bad)


_I8, _DELTAS = types.int64[::1], types.float32[:, ::1]


@njit([types.int64(_F4)], **_OPTIONS)  # type: ignore[untyped-decorator]
def count_bad(values: Any) -> Any:
    """How many entries are NaN or Inf."""
    exponent = np.uint32(0x7F800000)
    bad = np.uint32(0)
    for i in range(values.size):
        bad += np.uint32((_as_bits(values[i]) & exponent) == exponent)
    return np.int64(bad)


@njit([types.void(_F4, _I8)], **_OPTIONS)  # type: ignore[untyped-decorator]
def count_high(values: Any, counts: Any) -> None:
    """Add to the histogram of the upper 15 bits of |x|: counts [32768]."""
    for i in range(values.size):
        counts[(_as_bits(values[i]) & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1


@njit([types.void(_F4, types.int64, _I8)], **_OPTIONS)  # type: ignore[untyped-decorator]
def count_low(values: Any, bucket: Any, counts: Any) -> None:
    """Add to the histogram of the lower 16 bits of those |x| whose upper bits are `bucket`: counts [65536]."""
    for i in range(values.size):
        bits = _as_bits(values[i]) & np.uint32(0x7FFFFFFF)
        if np.int64(bits >> np.uint32(16)) == bucket:
            counts[bits & np.uint32(0xFFFF)] += 1


@njit([types.void(_F4, types.int64, types.int64, _I8)], **_OPTIONS)  # type: ignore[untyped-decorator]
def count_equal(values: Any, threshold: Any, row: Any, counts: Any) -> None:
    """Per row of `row` entries, how many |x| have exactly the bits `threshold`."""
    for r in range(counts.size):
        found = np.int64(0)
        for i in range(r * row, (r + 1) * row):
            found += np.int64(np.int64(_as_bits(values[i]) & np.uint32(0x7FFFFFFF)) == threshold)
        counts[r] = found


@njit([types.void(_F4, types.int64)], **_OPTIONS)  # type: ignore[untyped-decorator]
def trim(values: Any, least: Any) -> None:
    """Set every |x| whose bits are below `least` to zero."""
    for i in range(values.size):
        kept = np.int64(_as_bits(values[i]) & np.uint32(0x7FFFFFFF)) >= least
        values[i] = values[i] if kept else np.float32(0)


@njit([types.void(_F4, types.int64, types.int64, types.int64)], **_OPTIONS)  # type: ignore[untyped-decorator]
def trim_equals(values: Any, threshold: Any, seen: Any, quota: Any) -> None:
    """Keep what is above the threshold, and of its equals the first `quota`, `seen` of which came before."""
    for i in range(values.size):
        bits = np.int64(_as_bits(values[i]) & np.uint32(0x7FFFFFFF))
        if bits == threshold:
            seen += 1
            if seen > quota:
                values[i] = np.float32(0)
        elif bits < threshold:
            values[i] = np.float32(0)


@njit([types.int64(_DELTAS, _F4, _F4)], **_OPTIONS)  # type: ignore[untyped-decorator]
def elect(deltas: Any, weights: Any, out: Any) -> Any:
    """The sign of sum_i w_i d_i into `out` as -1, 0, 1; return the sum of the signs."""
    n, size = deltas.shape
    first = deltas[0]
    for j in range(size):
        out[j] = first[j] * weights[0]
    for i in range(1, n):
        delta, weight = deltas[i], weights[i]
        for j in range(size):
            out[j] += delta[j] * weight
    total = np.int32(0)
    for j in range(size):
        sign = np.int32(out[j] > np.float32(0)) - np.int32(out[j] < np.float32(0))
        out[j] = np.float32(sign)
        total += sign
    return np.int64(total)


@njit([types.void(_DELTAS, _F4, _F4, types.float32, types.boolean, _F4, _F4)], **_OPTIONS)  # type: ignore[untyped-decorator]
def combine(deltas: Any, weights: Any, signs: Any, zero: Any, mean: Any, divisor: Any, out: Any) -> None:
    """Sum of the w_i d_i of the elected sign, over the sum of their w_i if `mean`.  A sign of 0 becomes `zero`."""
    n, size = deltas.shape
    for j in range(size):
        signs[j] = zero if signs[j] == np.float32(0) else signs[j]
        out[j] = np.float32(0)
        divisor[j] = np.float32(0)
    for i in range(n):
        delta, weight = deltas[i], weights[i]
        for j in range(size):
            vote = delta[j] * weight
            agrees = vote * signs[j] > np.float32(0)  # a sign is 1 or -1, so the product is exact
            out[j] += vote if agrees else np.float32(0)
            divisor[j] += weight if agrees else np.float32(0)
    if mean:
        for j in range(size):
            out[j] = out[j] / (np.float32(1) if divisor[j] == np.float32(0) else divisor[j])
