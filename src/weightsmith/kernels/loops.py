"""What the kernels are made of: stored bits to float32 and back, sums of a fixed order.

`fastmath` stays off and products are not fused with sums: the same bytes as torch is the point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from weightsmith.kernels.record import BF16, E4M3, F16, F32, SIGNATURES, STRIP

__all__ = [
    "EXPONENT",
    "I8",
    "MAGNITUDE",
    "OPTIONS",
    "as_bits",
    "as_float",
    "broken",
    "decode",
    "encode",
    "exported",
    "fold",
    "more",
    "pointer",
    "strip",
    "subtract",
]

# numpy's error model: a division by 0 gives Inf or NaN and no Python exception.
OPTIONS = {"nogil": True, "error_model": "numpy"}
I8 = types.int64
MAGNITUDE, EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


def exported(f: Any) -> Any:
    """Compile to a C function with the arguments that `SIGNATURES` names."""
    arguments = [{"i": types.int64, "f": types.float32}[letter] for letter in SIGNATURES[f.__name__]]
    return cfunc(types.int64(*arguments), error_model="numpy")(f)


def _float8(mantissa: int, bias: int, ieee: bool) -> np.ndarray:
    """The 256 values of an 8-bit float.  `ieee`: the largest exponent means Inf and NaN, else only all ones is NaN."""
    # Subnormal numbers (exponent 0) have no leading 1.
    bits = np.arange(256)
    exponent, fraction = (bits & 0x7F) >> mantissa, (bits & ((1 << mantissa) - 1)) / (1 << mantissa)
    size = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    if ieee:
        top = exponent == 0x7F >> mantissa
        size = np.where(top, np.where(fraction == 0, np.inf, np.nan), size)
    else:
        size = np.where((bits & 0x7F) == 0x7F, np.nan, size)
    return np.where(bits < 128, size, -size).astype(np.float32)


_TABLE_E4M3, _TABLE_E5M2 = _float8(3, 7, False), _float8(2, 15, True)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_float(typing: Any, value: Any) -> Any:
    """Reinterpret uint32 bits as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(typing: Any, value: Any) -> Any:
    """Reinterpret a float32 as uint32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def strip(scratch: Any, place: Any, size: Any) -> Any:
    """The place-th strip of the scratch space: one contiguous array, as the vectoriser wants it."""
    return carray(pointer(scratch + 4 * STRIP * place), (size,), np.float32)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def more(count: Any, one: Any) -> Any:
    """A uint32 count, and one more where something is so.

    numba adds 32-bit integers in 64 bits, of which a vector holds half as many, unless the sum is cut off again.
    """
    return np.uint32(count + np.uint32(one))


# --- stored bits to float32 and back -----------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def decode(address: Any, kind: Any, start: Any, out: Any) -> None:
    """Entries start .. start + out.size of an array of stored bits -> float32."""
    n = out.size
    if kind == BF16:
        short = carray(pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            # bfloat16 is the upper half of a float32.
            out[j] = as_float(np.uint32(short[j]) << np.uint32(16))
    elif kind == F32:
        word = carray(pointer(address + 4 * start), (n,), np.uint32)
        for j in range(n):
            out[j] = as_float(word[j])
    elif kind == F16:
        half = carray(pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            bits = np.uint32(half[j])
            size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
            # As a float32 the bits stand for a number 2^112 times too small, subnormal ones included.
            scaled = as_bits(as_float(size) * np.float32(2.0**112))
            # The largest exponent of a half: Inf and NaN stay what they are.
            special = scaled | EXPONENT if size >= np.uint32(0x0F800000) else scaled
            out[j] = as_float(special | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16)))
    else:
        # A look-up of 1 kB that stays in the nearest cache.
        table = _TABLE_E4M3 if kind == E4M3 else _TABLE_E5M2
        byte = carray(pointer(address + start), (n,), np.uint8)
        for j in range(n):
            out[j] = table[byte[j]]


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def encode(values: Any, address: Any, kind: Any, start: Any) -> Any:
    """float32 -> entries start .. of an array of stored bits, to nearest even; how many results are NaN or Inf."""
    n = values.size
    bad = np.uint32(0)
    if kind == F32:
        word = carray(pointer(address + 4 * start), (n,), np.uint32)
        for j in range(n):
            bits = as_bits(values[j])
            word[j] = bits
            bad = more(bad, (bits & EXPONENT) == EXPONENT)
    elif kind == BF16:
        short = carray(pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            bits = as_bits(values[j])
            # Half of the last place that stays, less one, plus its own last bit: to nearest, ties to even.
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            # A NaN becomes the quiet NaN that torch writes.
            kept = np.uint32(0x7FC00000) if (bits & MAGNITUDE) > EXPONENT else rounded
            short[j] = np.uint16(kept >> np.uint32(16))
            bad = more(bad, (kept & EXPONENT) == EXPONENT)
    else:
        half = carray(pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            bits = as_bits(values[j])
            size = bits & MAGNITUDE
            odd = (size >> np.uint32(13)) & np.uint32(1)
            # Rebias the exponent from 127 to 15 and round to nearest even, in one subtraction.
            normal = np.uint32(size - np.uint32(0x37FFF001) + odd) >> np.uint32(13)
            # Below 2^-14 halves are subnormal: adding 0.5 rounds to their grid and leaves the result in the last bits.
            subnormal = np.uint32(as_bits(as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000))
            small = subnormal if size < np.uint32(0x38800000) else normal
            # A NaN becomes the quiet one; what is too large becomes Inf.
            large = np.uint32(0x7E00) if size > EXPONENT else np.uint32(0x7C00)
            # 2^16, the first number that a half cannot hold.
            kept = small if size < np.uint32(0x47800000) else large
            half[j] = np.uint16(kept | ((bits >> np.uint32(16)) & np.uint32(0x8000)))
            bad = more(bad, (kept & np.uint32(0x7C00)) == np.uint32(0x7C00))
    return I8(bad)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def subtract(values: Any, base: Any) -> None:
    for j in range(values.size):
        values[j] = values[j] - base[j]


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def broken(values: Any) -> Any:
    """How many entries are NaN or Inf."""
    found = np.uint32(0)
    for j in range(values.size):
        found = more(found, (as_bits(values[j]) & EXPONENT) == EXPONENT)
    return I8(found)


# --- sums --------------------------------------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def fold(values: Any) -> Any:
    """The sum of float64 values in the order of `ops.reduce.pairwise_sum`; they are overwritten."""
    length = values.size
    if length == 0:
        return np.float64(0)
    while length > 1:
        half = length >> 1  # onto the first half comes the second; an odd entry is carried
        for j in range(half):
            values[j] += values[half + j]
        if length & 1:
            values[half] = values[2 * half]
        length = half + (length & 1)
    return values[0]
