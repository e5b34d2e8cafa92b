"""The kernels that add: inputs with weights, and row by row in float64 in the order of `ops.reduce.pairwise_sum`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from weightsmith.kernels.loops import OPTIONS, broken, decode, encode, exported, fold, pointer, strip, subtract
from weightsmith.kernels.record import STRIP

__all__ = ["dots", "row_products", "row_sizes", "weighted_sum", "weighted_sums"]


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _multiply(a: Any, b: Any, out: Any) -> None:
    """The products of a row, after the first of the foldings: [m] twice -> [m - m // 2]."""
    # The first folding while multiplying: half the room, and one way less over it.
    half = a.size >> 1
    for j in range(half):
        out[j] = np.float64(a[j]) * np.float64(b[j]) + np.float64(a[half + j]) * np.float64(b[half + j])
    if a.size & 1:
        out[half] = np.float64(a[2 * half]) * np.float64(b[2 * half])


@exported
def row_products(
    inputs: Any, kinds: Any, count: Any, base: Any, base_kind: Any, deltas: Any, products: Any, rows: Any, width: Any,
    values: Any, wide: Any,
) -> Any:  # fmt: skip
    """Inner products row by row of all pairs i <= j of inputs, or of their differences from a base if `deltas`.

    products [count (count + 1) / 2, rows] float64; returns how many of the multiplied entries are NaN or Inf;
    inputs, kinds [count] int64; values [count + 1, width] float32 and wide [width] float64 are scratch space.
    """
    address, kind = carray(pointer(inputs), (count,), np.int64), carray(pointer(kinds), (count,), np.int64)
    found = carray(pointer(products), (count * (count + 1) // 2, rows), np.float64)
    value = carray(pointer(values), (count + 1, width), np.float32)
    folded = carray(pointer(wide), (width - (width >> 1),), np.float64)
    bad = 0
    for row in range(rows):
        if deltas:
            decode(base, base_kind, row * width, value[count])
        for i in range(count):
            decode(address[i], kind[i], row * width, value[i])
            if deltas:
                subtract(value[i], value[count])
            # A NaN among the inputs would make all shares NaN: it is counted here, to be named.
            bad += broken(value[i])
        # All decoded rows stay in the cache while their pairs are multiplied: one way over memory for n (n + 1) / 2
        # products.
        pair = 0
        for i in range(count):
            for j in range(i, count):
                _multiply(value[i], value[j], folded)
                found[pair, row] = fold(folded)
                pair += 1
    return bad


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _multiplied(value: Any, origin: Any, against: Any, total: Any, deltas: Any) -> None:
    """Add the products of a strip to sums of its places."""
    if deltas:
        for j in range(value.size):
            total[j] += (value[j] - origin[j]) * against[j]
    else:
        for j in range(value.size):
            total[j] += value[j] * against[j]


@exported
def dots(
    inputs: Any, kinds: Any, count: Any, base: Any, base_kind: Any, deltas: Any, other: Any, found: Any, size: Any,
    scratch: Any,
) -> Any:  # fmt: skip
    """Inner products of inputs, or of their differences from a base if `deltas`, with one other array.

    other [size] float32; found [count] float64; inputs, kinds [count] int64; scratch (count + 2) STRIP float32.
    """
    address, kind = carray(pointer(inputs), (count,), np.int64), carray(pointer(kinds), (count,), np.int64)
    total = carray(pointer(found), (count,), np.float64)
    against = carray(pointer(other), (size,), np.float32)
    # A float32 sum for each place of a strip: short enough to be exact to the last bits, and done by whole vectors.
    for i in range(count):
        strip(scratch, 2 + i, STRIP)[:] = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        value, origin = strip(scratch, 0, n), strip(scratch, 1, n)
        if deltas:
            decode(base, base_kind, low, origin)
        for i in range(count):
            decode(address[i], kind[i], low, value)
            _multiplied(value, origin, against[low : low + n], strip(scratch, 2 + i, n), deltas)
    for i in range(count):
        part = strip(scratch, 2 + i, STRIP)
        total[i] = 0
        for j in range(STRIP):
            total[i] += np.float64(part[j])
    return 0


@exported
def row_sizes(address: Any, kind: Any, sizes: Any, rows: Any, width: Any, values: Any, wide: Any) -> Any:
    """Per row sum |x|: sizes [rows] float64; values [width] float32 and wide [width] float64 are scratch."""
    found = carray(pointer(sizes), (rows,), np.float64)
    value = carray(pointer(values), (width,), np.float32)
    half = width >> 1
    folded = carray(pointer(wide), (width - half,), np.float64)
    for row in range(rows):
        decode(address, kind, row * width, value)
        for j in range(half):
            folded[j] = np.float64(abs(value[j])) + np.float64(abs(value[half + j]))
        if width & 1:
            folded[half] = np.float64(abs(value[2 * half]))
        found[row] = fold(folded)
    return 0


# --- weighted sums -----------------------------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _add(total: Any, value: Any, weight: Any, first: Any) -> None:
    # Not 0 + w x: the sum of an input alone keeps the sign of its zeros, as in torch.
    if first:
        for j in range(total.size):
            total[j] = value[j] * weight
    else:
        for j in range(total.size):
            total[j] += value[j] * weight


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _add_two(total: Any, one: Any, first: Any, other: Any, second: Any) -> None:
    for j in range(total.size):  # in this order; it saves writing the sum down in between
        total[j] = (total[j] + one[j] * first) + other[j] * second


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _end(total: Any, origin: Any, divisor: Any, scale: Any, deltas: Any) -> None:
    # x / 1 is x, but costs a division.
    if divisor != np.float32(1):
        for j in range(total.size):
            total[j] = total[j] / divisor
    if deltas:
        for j in range(total.size):
            total[j] = origin[j] + total[j] * scale


@exported
def weighted_sum(
    inputs: Any, kinds: Any, weights: Any, count: Any, base: Any, base_kind: Any, divisor: Any, scale: Any,
    deltas: Any, out: Any, out_kind: Any, size: Any, scratch: Any,
) -> Any:  # fmt: skip
    """x = sum_i w_i input_i, or base + scale sum_i w_i (input_i - base); returns how many results are NaN or Inf.

    inputs [count] addresses, kinds [count] int64, weights [count] float32; scratch 3 STRIP float32.
    """
    address, kind = carray(pointer(inputs), (count,), np.int64), carray(pointer(kinds), (count,), np.int64)
    weight = carray(pointer(weights), (count,), np.float32)
    bad = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        # Three strips of 8 kB: sum, input and base.
        total, value, origin = strip(scratch, 0, n), strip(scratch, 1, n), strip(scratch, 2, n)
        if deltas:
            decode(base, base_kind, low, origin)
        for i in range(count):
            decode(address[i], kind[i], low, value)
            if deltas:
                subtract(value, origin)
            _add(total, value, weight[i], i == 0)
        _end(total, origin, divisor, scale, deltas)
        bad += encode(total, out, out_kind, low)
    return bad


@exported
def weighted_sums(
    inputs: Any, kinds: Any, count: Any, base: Any, base_kind: Any, deltas: Any,
    weights: Any, ends: Any, outs: Any, variants: Any, out_kind: Any, size: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Several weighted sums of the same inputs, which are decoded once; returns how many results are NaN or Inf.

    inputs, kinds, count  as above; weights [variants, count] float32; ends [variants, 2] float32: divisor and scale
    outs [variants] addresses; scratch 2 + count STRIPs of float32.
    """
    address, kind = carray(pointer(inputs), (count,), np.int64), carray(pointer(kinds), (count,), np.int64)
    weight = carray(pointer(weights), (variants, count), np.float32)
    end = carray(pointer(ends), (variants, 2), np.float32)
    out = carray(pointer(outs), (variants,), np.int64)
    bad = 0
    # Half strips: those of three inputs, their base and the sum lie in a core's nearest cache together.
    for low in range(0, size, STRIP // 2):
        n = min(STRIP // 2, size - low)
        total, origin = strip(scratch, 0, n), strip(scratch, 1, n)
        if deltas:
            decode(base, base_kind, low, origin)
        for i in range(count):
            value = strip(scratch, 2 + i, n)
            decode(address[i], kind[i], low, value)
            if deltas:
                subtract(value, origin)
        # Inputs are float32 by now: each variant costs its sums and the rounding of its result.
        for v in range(variants):
            _add(total, strip(scratch, 2, n), weight[v, 0], True)
            for i in range(1, count - 1, 2):
                _add_two(total, strip(scratch, 2 + i, n), weight[v, i], strip(scratch, 3 + i, n), weight[v, i + 1])
            if count % 2 == 0:
                _add(total, strip(scratch, 1 + count, n), weight[v, count - 1], False)
            _end(total, origin, end[v, 0], end[v, 1], deltas)
            bad += encode(total, out[v], out_kind, low)
    return bad
