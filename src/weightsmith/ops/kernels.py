"""The loops behind `ops.fused`, as numba compiles them; `ops.native` keeps the machine code.

Every kernel takes addresses and sizes and works through its block in strips of STRIP entries: an input's strip is
decoded to float32, used, and overwritten by the next one's, so that all of it stays in a core's own cache.
`fastmath` stays off and products are not fused with sums: the same bytes as torch is the point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from weightsmith.kernel import BF16, E4M3, F16, F32, SIGNATURES, STRIP

__all__ = ["KERNELS"]

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_I8 = types.int64
_MAGNITUDE, _EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


def _float8(mantissa: int, bias: int, ieee: bool) -> np.ndarray:
    """The 256 values of an 8-bit float.  `ieee`: the largest exponent means Inf and NaN, else only all ones is NaN."""
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
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


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


def _exported(f: Any) -> Any:
    """Compile to a C function with the arguments that `SIGNATURES` names."""
    arguments = [{"i": types.int64, "f": types.float32}[letter] for letter in SIGNATURES[f.__name__]]
    return cfunc(types.int64(*arguments), error_model="numpy")(f)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _strip(scratch: Any, place: Any, size: Any) -> Any:
    """The place-th strip of the scratch space: one contiguous array, as the vectoriser wants it."""
    return carray(_pointer(scratch + 4 * STRIP * place), (size,), np.float32)


# --- stored bits to float32 and back -----------------------------------------------------------------


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _decode(address: Any, kind: Any, start: Any, out: Any) -> None:
    """Entries start .. start + out.size of an array of stored bits -> float32."""
    n = out.size
    if kind == BF16:
        short = carray(_pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            out[j] = _as_float(np.uint32(short[j]) << np.uint32(16))
    elif kind == F32:
        word = carray(_pointer(address + 4 * start), (n,), np.uint32)
        for j in range(n):
            out[j] = _as_float(word[j])
    elif kind == F16:
        half = carray(_pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            bits = np.uint32(half[j])
            size = (bits & np.uint32(0x7FFF)) << np.uint32(13)
            # As a float32 the bits stand for a number 2^112 times too small, subnormal ones included.
            scaled = _as_bits(_as_float(size) * np.float32(2.0**112))
            special = scaled | _EXPONENT if size >= np.uint32(0x0F800000) else scaled
            out[j] = _as_float(special | ((bits & np.uint32(0x8000)) << np.uint32(16)))
    else:
        table = _TABLE_E4M3 if kind == E4M3 else _TABLE_E5M2
        byte = carray(_pointer(address + start), (n,), np.uint8)
        for j in range(n):
            out[j] = table[byte[j]]


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _encode(values: Any, address: Any, kind: Any, start: Any) -> Any:
    """float32 -> entries start .. of an array of stored bits, to nearest even; how many results are NaN or Inf."""
    n = values.size
    bad = np.uint32(0)
    if kind == F32:
        word = carray(_pointer(address + 4 * start), (n,), np.uint32)
        for j in range(n):
            bits = _as_bits(values[j])
            word[j] = bits
            bad += np.uint32((bits & _EXPONENT) == _EXPONENT)
    elif kind == BF16:
        short = carray(_pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            bits = _as_bits(values[j])
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            # A NaN becomes the quiet NaN that torch writes.
            kept = np.uint32(0x7FC00000) if (bits & _MAGNITUDE) > _EXPONENT else rounded
            short[j] = np.uint16(kept >> np.uint32(16))
            bad += np.uint32((kept & _EXPONENT) == _EXPONENT)
    else:
        half = carray(_pointer(address + 2 * start), (n,), np.uint16)
        for j in range(n):
            bits = _as_bits(values[j])
            size = bits & _MAGNITUDE
            odd = (size >> np.uint32(13)) & np.uint32(1)
            normal = (size - np.uint32(0x37FFF001) + odd) >> np.uint32(13)
            # Below 2^-14 halves are subnormal: adding 0.5 rounds to their grid and leaves the result in the last bits.
            subnormal = _as_bits(_as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000)
            small = subnormal if size < np.uint32(0x38800000) else normal
            large = np.uint32(0x7E00) if size > _EXPONENT else np.uint32(0x7C00)
            kept = small if size < np.uint32(0x47800000) else large
            half[j] = np.uint16(kept | ((bits >> np.uint32(16)) & np.uint32(0x8000)))
            bad += np.uint32((kept & np.uint32(0x7C00)) == np.uint32(0x7C00))
    return _I8(bad)


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _subtract(values: Any, base: Any) -> None:
    for j in range(values.size):
        values[j] = values[j] - base[j]


# --- weighted sums -----------------------------------------------------------------------------------


@_exported
def weighted_sum(
    inputs: Any, kinds: Any, weights: Any, count: Any, base: Any, base_kind: Any, divisor: Any, scale: Any,
    deltas: Any, out: Any, out_kind: Any, size: Any, scratch: Any,
) -> Any:  # fmt: skip
    """x = sum_i w_i input_i, or base + scale sum_i w_i (input_i - base); returns how many results are NaN or Inf.

    inputs [count] addresses, kinds [count] int64, weights [count] float32; scratch 3 STRIP float32.
    """
    address, kind = carray(_pointer(inputs), (count,), np.int64), carray(_pointer(kinds), (count,), np.int64)
    weight = carray(_pointer(weights), (count,), np.float32)
    bad = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        total, value, origin = _strip(scratch, 0, n), _strip(scratch, 1, n), _strip(scratch, 2, n)
        if deltas:
            _decode(base, base_kind, low, origin)
        for i in range(count):
            _decode(address[i], kind[i], low, value)
            if deltas:
                _subtract(value, origin)
            w = weight[i]
            if i == 0:
                for j in range(n):
                    total[j] = value[j] * w
            else:
                for j in range(n):
                    total[j] += value[j] * w
        if divisor != np.float32(1):
            for j in range(n):
                total[j] = total[j] / divisor
        if deltas:
            for j in range(n):
                total[j] = origin[j] + total[j] * scale
        bad += _encode(total, out, out_kind, low)
    return bad


# --- trimmed votes -----------------------------------------------------------------------------------


@_exported
def magnitudes(address: Any, kind: Any, base: Any, base_kind: Any, size: Any, out: Any, scratch: Any) -> Any:
    """The bits of |input - base|: out [size] uint32; scratch 2 STRIP float32.  Returns 0."""
    found = carray(_pointer(out), (size,), np.uint32)
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        value, origin = _strip(scratch, 0, n), _strip(scratch, 1, n)
        _decode(base, base_kind, low, origin)
        _decode(address, kind, low, value)
        for j in range(n):
            found[low + j] = _as_bits(value[j] - origin[j]) & _MAGNITUDE
    return 0


_GROUP = 16


@_exported
def count_between(
    address: Any, kind: Any, base: Any, base_kind: Any, size: Any,
    lowest: Any, width: Any, shift: Any, counts: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Histogram of the bits of |input - base| from `lowest` on; returns how many lie above.

    counts[(bits - lowest) >> shift] += 1 for bits in lowest .. lowest + (width << shift); counts [width + 1] uint32,
    whose last entry gains every bit that `shift` has shifted out.
    """
    found = carray(_pointer(counts), (width + 1,), np.uint32)
    first, span, down = np.uint32(lowest), np.uint32(min(width << shift, 0xFFFFFFFF)), np.uint32(shift)
    lost, rest = np.uint32((1 << shift) - 1), np.uint32(0)
    above = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        value, origin = _strip(scratch, 0, n), _strip(scratch, 1, n)
        _decode(base, base_kind, low, origin)
        _decode(address, kind, low, value)
        over = np.uint32(0)
        for j in range(n):
            bits = _as_bits(value[j] - origin[j]) & _MAGNITUDE
            place = np.uint32(bits - first)  # wraps to something large where bits < first
            value[j] = _as_float(place)
            over += np.uint32(np.uint32(bits >= first) & np.uint32(place >= span))
        above += _I8(over)
        whole = n - n % _GROUP
        for j in range(0, whole, _GROUP):
            some = np.uint32(0)
            for k in range(j, j + _GROUP):  # few groups hold anything: look at sixteen at once
                some |= np.uint32(_as_bits(value[k]) < span)
            if some:
                for k in range(j, j + _GROUP):
                    place = _as_bits(value[k])
                    if place < span:
                        found[place >> down] += np.uint32(1)
                        rest |= place & lost
        for k in range(whole, n):
            place = _as_bits(value[k])
            if place < span:
                found[place >> down] += np.uint32(1)
                rest |= place & lost
    found[width] |= rest
    return above


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _trim(values: Any, threshold: Any, quota: Any, ties: Any, seen: Any) -> Any:
    """Zero what lies below the threshold, and of its equals all but the first `quota` of `ties`, `seen` before these.

    Returns how many equals have been seen now.
    """
    least = np.uint32(threshold if quota else threshold + 1)
    if quota != ties:
        equal, here = np.uint32(threshold), np.uint32(0)
        for j in range(values.size):
            here += np.uint32((_as_bits(values[j]) & _MAGNITUDE) == equal)
        if seen < quota < seen + here:  # the cut lies in this strip
            for j in range(values.size):
                bits = _as_bits(values[j]) & _MAGNITUDE
                seen += bits == equal
                if bits < equal or (bits == equal and seen > quota):
                    values[j] = np.float32(0)
            return seen
        least = np.uint32(threshold if seen + here <= quota else threshold + 1)
        seen += here
    for j in range(values.size):
        kept = (_as_bits(values[j]) & _MAGNITUDE) >= least
        values[j] = values[j] if kept else np.float32(0)
    return seen


@njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _combine(scratch: Any, count: Any, weight: Any, elected: Any, divisor: Any) -> None:
    """The first strip becomes the sum of the votes of the elected sign, `divisor` the sum of their weights."""
    n = elected.size
    total = _strip(scratch, 0, n)
    for i in range(count):
        vote, w = _strip(scratch, i, n), weight[i]
        if i == 0:
            for j in range(n):
                agrees = vote[j] * elected[j] > np.float32(0)  # a sign is 1 or -1, so the product is exact
                total[j] = vote[j] if agrees else np.float32(0)
                divisor[j] = w if agrees else np.float32(0)
        else:
            for j in range(n):
                agrees = vote[j] * elected[j] > np.float32(0)
                total[j] += vote[j] if agrees else np.float32(0)
                divisor[j] += w if agrees else np.float32(0)


@_exported
def trimmed_vote(
    inputs: Any, kinds: Any, weights: Any, count: Any, base: Any, base_kind: Any, cuts: Any, seen: Any, trim: Any,
    zero: Any, mean: Any, scale: Any, out: Any, out_kind: Any, signs: Any, size: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Trim, elect, combine, as `Ties.merge` does; returns how many inputs and results are NaN or Inf.

    cuts [3, count] int64: threshold, quota, ties of each expert; seen [count] int64, equals met so far, is brought
    up to date; signs [1] int64 gains the sum of the elected signs.  With `out` 0 that is all that is done.
    scratch: (count + 3) STRIP float32.
    """
    address, kind = carray(_pointer(inputs), (count,), np.int64), carray(_pointer(kinds), (count,), np.int64)
    weight = carray(_pointer(weights), (count,), np.float32)
    cut, met = carray(_pointer(cuts), (3, count), np.int64), carray(_pointer(seen), (count,), np.int64)
    majority = carray(_pointer(signs), (1,), np.int64)
    bad = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        origin, elected = _strip(scratch, count, n), _strip(scratch, count + 1, n)
        divisor = _strip(scratch, count + 2, n)
        _decode(base, base_kind, low, origin)
        for i in range(count):
            vote = _strip(scratch, i, n)
            _decode(address[i], kind[i], low, vote)
            w = weight[i]
            broken = np.uint32(0)
            for j in range(n):
                vote[j] = vote[j] - origin[j]
                broken += np.uint32((_as_bits(vote[j]) & _EXPONENT) == _EXPONENT)  # a vote would hide it
            bad += _I8(broken)
            if trim:
                met[i] = _trim(vote, cut[0, i], cut[1, i], cut[2, i], met[i])
            if i == 0:
                for j in range(n):
                    vote[j] = vote[j] * w
                    elected[j] = vote[j]
            else:
                for j in range(n):
                    vote[j] = vote[j] * w
                    elected[j] += vote[j]
        balance = np.int32(0)
        for j in range(n):
            sign = np.int32(elected[j] > np.float32(0)) - np.int32(elected[j] < np.float32(0))
            balance += sign
            elected[j] = zero if sign == 0 else np.float32(sign)
        majority[0] += _I8(balance)
        if out == 0:
            continue
        total = _strip(scratch, 0, n)
        _combine(scratch, count, weight, elected, divisor)
        if mean:
            for j in range(n):
                total[j] = total[j] / (np.float32(1) if divisor[j] == np.float32(0) else divisor[j])
        for j in range(n):
            total[j] = origin[j] + total[j] * scale
        bad += _encode(total, out, out_kind, low)
    return bad


KERNELS: Mapping[str, Any] = {f.__name__: f for f in (weighted_sum, magnitudes, count_between, trimmed_vote)}
"""Name -> compiled C function."""
