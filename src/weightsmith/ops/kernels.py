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
