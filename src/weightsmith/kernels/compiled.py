"""The kernels, as numba compiles them; `kernels.native` keeps the machine code.

Every kernel takes addresses and sizes and works through its block in strips of STRIP entries: an input's strip is
decoded to float32, used, and overwritten by the next one's, so that all of it stays in a core's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import carray, njit

from weightsmith.kernels.loops import (
    EXPONENT,
    I8,
    MAGNITUDE,
    OPTIONS,
    as_bits,
    as_float,
    broken,
    decode,
    drop,
    encode,
    exported,
    fold,
    pointer,
    strip,
    subtract,
    trim,
)
from weightsmith.kernels.record import HIGH, MERGE, STRIP
from weightsmith.kernels.sums import row_products, row_sizes

__all__ = ["KERNELS"]


# --- weighted sums -----------------------------------------------------------------------------------


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
        total, value, origin = strip(scratch, 0, n), strip(scratch, 1, n), strip(scratch, 2, n)
        if deltas:
            decode(base, base_kind, low, origin)
        for i in range(count):
            decode(address[i], kind[i], low, value)
            if deltas:
                subtract(value, origin)
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
        bad += encode(total, out, out_kind, low)
    return bad


# --- cuts -------------------------------------------------------------------------------------------


@exported
def magnitudes(address: Any, kind: Any, base: Any, base_kind: Any, size: Any, out: Any, scratch: Any) -> Any:
    """The bits of |input - base|: out [size] uint32; scratch 2 STRIP float32.  Returns 0."""
    found = carray(pointer(out), (size,), np.uint32)
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        value, origin = strip(scratch, 0, n), strip(scratch, 1, n)
        decode(base, base_kind, low, origin)
        decode(address, kind, low, value)
        for j in range(n):
            found[low + j] = as_bits(value[j] - origin[j]) & MAGNITUDE
    return 0


_GROUP = 16


@exported
def count_between(
    address: Any, kind: Any, base: Any, base_kind: Any, size: Any,
    lowest: Any, width: Any, shift: Any, counts: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Histogram of the bits of |input - base| from `lowest` on; returns how many lie above.

    counts[(bits - lowest) >> shift] += 1 for bits in lowest .. lowest + (width << shift); counts [2 width] uint32,
    whose second half gains, bin by bin, the bits that `shift` has shifted out.
    """
    found = carray(pointer(counts), (2 * width,), np.uint32)
    first, span, down = np.uint32(lowest), np.uint32(min(width << shift, 0xFFFFFFFF)), np.uint32(shift)
    lost = np.uint32((1 << shift) - 1)
    above = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        value, origin = strip(scratch, 0, n), strip(scratch, 1, n)
        decode(base, base_kind, low, origin)
        decode(address, kind, low, value)
        over = np.uint32(0)
        for j in range(n):
            bits = as_bits(value[j] - origin[j]) & MAGNITUDE
            place = np.uint32(bits - first)  # wraps to something large where bits < first
            value[j] = as_float(place)
            over += np.uint32(np.uint32(bits >= first) & np.uint32(place >= span))
        above += I8(over)
        whole = n - n % _GROUP
        for j in range(0, whole, _GROUP):
            some = np.uint32(0)
            for k in range(j, j + _GROUP):  # few groups hold anything: look at sixteen at once
                some |= np.uint32(as_bits(value[k]) < span)
            if some:
                for k in range(j, j + _GROUP):
                    place = as_bits(value[k])
                    if place < span:
                        found[place >> down] += np.uint32(1)
                        if place & lost:
                            found[width + (place >> down)] |= place & lost
        for k in range(whole, n):
            place = as_bits(value[k])
            if place < span:
                found[place >> down] += np.uint32(1)
                if place & lost:
                    found[width + (place >> down)] |= place & lost
    return above


@exported
def count_cells(
    address: Any, kind: Any, base: Any, base_kind: Any, size: Any, cells: Any, counts: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Count every |input - base| by its bits: all in one pass, however many cells are open.  Returns 0.

    cells   [2, 2^15] uint32, for each value of the upper 16 bits: where its counters begin, and 0xFFFF where the lower
            16 bits are told apart as well, else 0
    counts  int64, as many as the cells ask for; scratch 2 STRIP float32
    """
    first, apart = carray(pointer(cells), (HIGH,), np.uint32), carray(pointer(cells + 4 * HIGH), (HIGH,), np.uint32)
    found = carray(pointer(counts), (HIGH,), np.int64)  # and what comes behind
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        value, origin = strip(scratch, 0, n), strip(scratch, 1, n)
        decode(base, base_kind, low, origin)
        decode(address, kind, low, value)
        subtract(value, origin)
        for j in range(n):
            bits = as_bits(value[j]) & MAGNITUDE
            cell = bits >> np.uint32(16)
            found[first[cell] + (bits & apart[cell])] += 1
    return 0


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _combine(scratch: Any, count: Any, weight: Any, elected: Any, divisor: Any) -> None:
    """The first strip becomes the sum of the votes of the elected sign, `divisor` the sum of their weights."""
    n = elected.size
    total = strip(scratch, 0, n)
    for i in range(count):
        vote, w = strip(scratch, i, n), weight[i]
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


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _masked(values: Any, i: Any, low: Any, cuts: Any, seen: Any, draws: Any, start: Any, room: Any) -> None:
    """What filters leave of a strip of expert i's task vector, the entries from `low` on of a block.

    cuts   [sides, 3, count] int64, see `masked_merge`; seen [sides, count] is brought up to date
    draws  [count, 3] int64: the two halves of its noise's key, and the number its noise must stay below
    """
    for side in range(cuts.shape[0]):
        threshold, quota, ties = cuts[side, 0, i], cuts[side, 1, i], cuts[side, 2, i]
        seen[side, i] = trim(values, side == 0, threshold, quota, ties, seen[side, i])
    if draws.size:
        drop(values, draws[i, 0], draws[i, 1], draws[i, 2], start + low, room)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _agreeing(base: Any, agree: Any, count: Any, k: Any, scratch: Any, address: Any, kind: Any, low: Any) -> None:
    """Zero the entries of the first strip, tau, that fewer than k task masks |delta| > agree |tau - delta| select."""
    n = base.size
    tau, value, votes = strip(scratch, 0, n), strip(scratch, count + 1, n), strip(scratch, count + 2, n)
    for j in range(n):
        votes[j] = np.float32(0)
    for i in range(count):
        decode(address[i], kind[i], low, value)
        strict = agree[i]
        for j in range(n):
            delta = value[j] - base[j]
            votes[j] += np.float32(abs(delta) > abs(tau[j] - delta) * strict)
    for j in range(n):
        tau[j] = tau[j] if votes[j] >= k else np.float32(0)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _job(record: Any) -> Any:
    """The record at an address."""
    return carray(pointer(record), (1,), MERGE)[0]


@exported
def masked_merge(record: Any) -> Any:
    """Mask task vectors, weigh and combine them; returns how many inputs and results are NaN or Inf.

    The record's fields (`MERGE`):

    cuts     [sides, 3, count] int64: threshold, quota, ties; what comes after the first cut or before the second
             becomes zero.  seen [sides, count]: equals met so far, brought up to date
    draws    [count, 3] int64 or 0: the noise of each expert, whose first number here is the `start`-th
    factors  [count] float32 or 0: the survivors are multiplied by them; shares, likewise: divided by them
    vote     elect signs as `Ties.merge` does, `zero` where there is none, and divide by the agreeing weights if `mean`;
             else the sum is divided by `divisor`
    agree    [count] float32 or 0: of the scaled result tau stays what k task masks select, times `after`
    signs    [1] int64 gains the sum of the elected signs.  With `out` 0 that is all that is done.
    scratch  (count + 4) STRIP float32
    """
    job = _job(record)
    count, size, sides, start, scratch = job.count, job.size, job.sides, job.start, job.scratch
    base, base_kind, out, out_kind = job.base, job.base_kind, job.out, job.out_kind
    factors, shares, agree, k = job.factors, job.shares, job.agree, job.k
    vote, mean, zero, divisor, scale, after = job.vote, job.mean, job.zero, job.divisor, job.scale, job.after
    address, kind = carray(pointer(job.inputs), (count,), np.int64), carray(pointer(job.kinds), (count,), np.int64)
    weight = carray(pointer(job.weights), (count,), np.float32)
    cut = carray(pointer(job.cuts), (sides, 3, count), np.int64)
    met = carray(pointer(job.seen), (sides, count), np.int64)
    draw = carray(pointer(job.draws), (count if job.draws else 0, 3), np.int64)
    factor, share = carray(pointer(factors), (count,), np.float32), carray(pointer(shares), (count,), np.float32)
    strict = carray(pointer(agree), (count,), np.float32)
    majority = carray(pointer(job.signs), (1,), np.int64)
    room = scratch + 4 * STRIP * (count + 2)
    bad = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        origin, elected = strip(scratch, count, n), strip(scratch, count + 1, n)
        decode(base, base_kind, low, origin)
        for i in range(count):
            voice = strip(scratch, i, n)
            decode(address[i], kind[i], low, voice)
            unfit = np.uint32(0)
            for j in range(n):
                voice[j] = voice[j] - origin[j]
                unfit += np.uint32((as_bits(voice[j]) & EXPONENT) == EXPONENT)  # a mask would hide it
            bad += I8(unfit)
            _masked(voice, i, low, cut, met, draw, start, room)
            if factors:
                for j in range(n):
                    voice[j] = voice[j] * factor[i]
            if shares:
                for j in range(n):
                    voice[j] = voice[j] / share[i]
            w = weight[i]
            if i == 0:
                for j in range(n):
                    voice[j] = voice[j] * w
                    elected[j] = voice[j]
            else:
                for j in range(n):
                    voice[j] = voice[j] * w
                    elected[j] += voice[j]
        total = strip(scratch, 0, n)
        if vote:
            balance = np.int32(0)
            for j in range(n):
                sign = np.int32(elected[j] > np.float32(0)) - np.int32(elected[j] < np.float32(0))
                balance += sign
                elected[j] = zero if sign == 0 else np.float32(sign)
            majority[0] += I8(balance)
            if out == 0:
                continue
            agreeing = strip(scratch, count + 2, n)
            _combine(scratch, count, weight, elected, agreeing)
            if mean:
                for j in range(n):
                    total[j] = total[j] / (np.float32(1) if agreeing[j] == np.float32(0) else agreeing[j])
        else:
            for j in range(n):
                total[j] = elected[j]
            if divisor != np.float32(1):
                for j in range(n):
                    total[j] = total[j] / divisor
        for j in range(n):
            total[j] = total[j] * scale
        if agree:
            for j in range(n):
                total[j] = np.float32(0) + total[j]  # as around a base of zeros: no zero has a sign
            _agreeing(origin, strict, count, k, scratch, address, kind, low)
            for j in range(n):
                total[j] = total[j] * after
        for j in range(n):
            total[j] = origin[j] + total[j]
        bad += encode(total, out, out_kind, low)
    return bad


# --- measuring: sums of a fixed order ----------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _sizes(values: Any, out: Any) -> None:
    for j in range(values.size):
        out[j] = np.float64(abs(values[j]))


@exported
def row_masses(record: Any, expert: Any, whole: Any, left: Any, rows: Any, width: Any, wide: Any) -> Any:
    """Per row sum |delta|, and of what the filters leave of it; returns how many entries are NaN or Inf.

    record  inputs, base, cuts, seen, draws, start as of `masked_merge`; scratch 4 STRIP float32
    expert  whose task vector; whole, left [rows] float64; wide [2, width] float64
    """
    job = _job(record)
    count, sides, start, scratch, base, base_kind = (
        job.count,
        job.sides,
        job.start,
        job.scratch,
        job.base,
        job.base_kind,
    )
    address = carray(pointer(job.inputs), (count,), np.int64)[expert]
    kind = carray(pointer(job.kinds), (count,), np.int64)[expert]
    cut = carray(pointer(job.cuts), (sides, 3, count), np.int64)
    met = carray(pointer(job.seen), (sides, count), np.int64)
    draw = carray(pointer(job.draws), (count if job.draws else 0, 3), np.int64)
    everything, some = carray(pointer(whole), (rows,), np.float64), carray(pointer(left), (rows,), np.float64)
    room = scratch + 4 * STRIP * 2
    before, after = carray(pointer(wide), (width,), np.float64), carray(pointer(wide + 8 * width), (width,), np.float64)
    bad = 0
    for row in range(rows):
        for low in range(0, width, STRIP):
            n = min(STRIP, width - low)
            value, origin = strip(scratch, 0, n), strip(scratch, 1, n)
            place = row * width + low
            decode(base, base_kind, place, origin)
            decode(address, kind, place, value)
            subtract(value, origin)
            bad += broken(value)
            _sizes(value, before[low : low + n])
            _masked(value, expert, place, cut, met, draw, start, room)
            _sizes(value, after[low : low + n])
        everything[row], some[row] = fold(before), fold(after)
    return bad


KERNELS: Mapping[str, Any] = {
    f.__name__: f
    for f in (
        weighted_sum,
        magnitudes,
        count_between,
        count_cells,
        masked_merge,
        row_masses,
        row_products,
        row_sizes,
    )
}
"""Name -> compiled C function."""
