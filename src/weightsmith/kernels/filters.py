"""The kernels' filters of task vectors: what is dropped by size or at random.

A filter works on a strip of one expert's task vector; what it needs to know is in a `FILTER` record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from weightsmith.kernels.loops import (
    EXPONENT,
    I8,
    MAGNITUDE,
    OPTIONS,
    as_bits,
    decode,
    exported,
    more,
    pointer,
    strip,
)
from weightsmith.kernels.record import FILTER, MERGE, STRIP

__all__ = ["drawn", "elected", "filtered", "job_at", "masked", "philox", "task_vector"]


# --- by size, and at random -------------------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def trim(values: Any, front: Any, threshold: Any, quota: Any, ties: Any, seen: Any) -> Any:
    """Keep what lies in `front` of a cut, or else what lies behind it; the rest becomes zero.

    In front lies what is above the threshold, and of its equals the first `quota` of `ties`, `seen` of them before
    these.  Returns how many equals have been seen now.
    """
    # Without a split of equals one comparison decides; with quota 0 equals are behind.
    least = np.uint32(threshold if quota else threshold + 1)
    if quota != ties:
        # How many equals lie in this strip; only where the cut lies among them are they numbered.
        equal, here = np.uint32(threshold), np.uint32(0)
        for j in range(values.size):
            here = more(here, (as_bits(values[j]) & MAGNITUDE) == equal)
        if seen < quota < seen + here:  # the cut lies in this strip
            for j in range(values.size):
                bits = as_bits(values[j]) & MAGNITUDE
                seen += bits == equal
                first = bits > equal or (bits == equal and seen <= quota)
                values[j] = values[j] if first == front else np.float32(0)
            return seen
        # All equals of this strip are on one side.
        least = np.uint32(threshold if seen + here <= quota else threshold + 1)
        seen += here
    for j in range(values.size):
        first = (as_bits(values[j]) & MAGNITUDE) >= least
        values[j] = values[j] if first == front else np.float32(0)
    return seen


@intrinsic  # type: ignore[untyped-decorator]
def _product(typing: Any, a: Any, b: Any) -> Any:
    """The upper and the lower half of the product of two 64-bit numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = args[0].type
        wide = type(narrow)(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        halves = builder.trunc(builder.lshr(product, wide(64)), narrow), builder.trunc(product, narrow)
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate


_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_ROUNDS = 10


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def philox(key0: Any, key1: Any, part: Any, first: Any, count: Any, room: Any) -> None:
    """Philox 4x64-10 (Salmon et al., SC 2011) at `count` counters: room [16 count] uint16, see `ops.noise`."""
    for step in range(count):
        a, b, c, d = np.uint64(first + step + 1), np.uint64(part), np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(key0), np.uint64(key1)
        for _ in range(_ROUNDS):
            high0, low0 = _product(_M0, a)
            high1, low1 = _product(_M1, c)
            a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
            k0, k1 = k0 + _W0, k1 + _W1
        at = step << 2
        room[at], room[at + 1], room[at + 2], room[at + 3] = a, b, c, d


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _drawn(kept: Any, key0: Any, key1: Any, limit: Any, start: Any, room: Any) -> None:
    """Whether the numbers of the stream (key0, key1) from the `start`-th on are below `limit`: kept uint8.

    The numbers are those of `ops.noise.bernoulli`: 16 bits decide, but where they equal those of the limit.
    `room` is the address of 2 (kept.size + 32) uint16.
    """
    n, lane, first = kept.size, start & 15, start >> 4
    if limit > I8(0xFFFFFFFF):
        for j in range(n):
            kept[j] = 1
        return
    count = (lane + n + 15) >> 4
    # From the first number on: a sum as an index is tested for being negative, entry by entry.
    upper = carray(pointer(room + 2 * lane), (n,), np.uint16)
    philox(key0, key1, 0, first, count, carray(pointer(room), (4 * count,), np.uint64))
    top, rest = np.uint16(limit >> 16), np.uint16(limit & 0xFFFF)
    equal = np.uint32(0)
    if rest:
        for j in range(n):
            equal = more(equal, upper[j] == top)
    if equal:
        second = room + 32 * count
        lower = carray(pointer(second + 2 * lane), (n,), np.uint16)
        philox(key0, key1, 1, first, count, carray(pointer(second), (4 * count,), np.uint64))
        for j in range(n):
            kept[j] = upper[j] < top or (upper[j] == top and lower[j] < rest)
    else:
        for j in range(n):
            kept[j] = upper[j] < top


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _unpacked(packed: Any, room: Any, count: Any) -> None:
    """The bits of `count` bytes, the highest first, as bytes that are 0 or not: 8 count of them."""
    byte, word = carray(pointer(packed), (count,), np.uint8), carray(pointer(room), (count,), np.uint64)
    for j in range(count):
        # The byte eight times, of each the bit that is wanted there.
        word[j] = (np.uint64(byte[j]) * np.uint64(0x0101010101010101)) & np.uint64(0x0102040810204080)


# --- one filter after the other ---------------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def job_at(record: Any) -> Any:
    """The MERGE at an address."""
    return carray(pointer(record), (1,), MERGE)[0]


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _trimmed(values: Any, job: Any, one: Any, i: Any) -> None:
    """What the cuts of a filter leave of a strip of expert i's task vector, see `masked`."""
    count = job.count
    cuts = carray(pointer(one.cuts), (one.sides, 3, count), np.int64)
    seen = carray(pointer(one.seen), (one.sides, count), np.int64)
    for side in range(one.sides):
        seen[side, i] = trim(values, side == 0, cuts[side, 0, i], cuts[side, 1, i], cuts[side, 2, i], seen[side, i])


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def masked(values: Any, job: Any, step: Any, i: Any, low: Any, room: Any) -> None:
    """What the masks of a filter leave of a strip of expert i's task vector, the entries from `low` on of a block.

    cuts   [sides, 3, count] int64: threshold, quota, ties; what comes after the first cut or before the second
           becomes zero.  seen [sides, count]: equals met so far, brought up to date
    draws  [count, 3] int64: the two halves of its noise's key, and the number its noise must stay below
    kept   [count, size] bits, packed as by numpy: 0 where an entry becomes zero; noise and votes have done their part
    room   the address of two strips
    """
    count = job.count
    one = carray(pointer(job.filters), (job.steps,), FILTER)[step]
    _trimmed(values, job, one, i)
    n = values.size
    if one.draws and not one.kept:
        draws = carray(pointer(one.draws), (count, 3), np.int64)
        if draws[i, 2] > I8(0xFFFFFFFF):
            return
        own = carray(pointer(room + 6 * STRIP), (n,), np.uint8)  # the numbers before it take 4 STRIP + 128 bytes
        _drawn(own, draws[i, 0], draws[i, 1], draws[i, 2], job.start + low, room)
        for j in range(n):
            values[j] = values[j] if own[j] else np.float32(0)
    elif one.kept:
        place = i * job.size + low
        _unpacked(one.kept + (place >> 3), room, ((place & 7) + n + 7) >> 3)
        kept = carray(pointer(room + (place & 7)), (n,), np.uint8)
        for j in range(n):
            values[j] = values[j] if kept[j] else np.float32(0)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def filtered(values: Any, job: Any, steps: Any, i: Any, low: Any, room: Any) -> None:
    """What the first `steps` filters leave of a strip, see `masked`; room: the address of two strips.

    factors  [count] float32 or 0: the survivors are multiplied by them
    shares   likewise: and divided by them
    """
    # A factor of one filter is applied before the next one looks: ranks and masks see what is there.
    for step in range(steps):
        masked(values, job, step, i, low, room)
        one = carray(pointer(job.filters), (job.steps,), FILTER)[step]
        if one.factors:
            factor = carray(pointer(one.factors), (job.count,), np.float32)[i]
            for j in range(values.size):
                values[j] = values[j] * factor
        if one.shares:
            share = carray(pointer(one.shares), (job.count,), np.float32)[i]
            for j in range(values.size):  # one division per entry, as torch divides
                values[j] = values[j] / share


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def task_vector(job: Any, i: Any, low: Any, values: Any, base: Any) -> Any:
    """A strip of expert i's task vector; returns how many of its entries are NaN or Inf, which a mask would hide.

    base  the same strip of the base, decoded
    """
    address = carray(pointer(job.inputs), (job.count,), np.int64)[i]
    kind = carray(pointer(job.kinds), (job.count,), np.int64)[i]
    decode(address, kind, low, values)
    # A NaN in a dropped place would vanish without a word, so it is counted before any mask.
    unfit = np.uint32(0)
    for j in range(values.size):
        values[j] = values[j] - base[j]
        unfit = more(unfit, (as_bits(values[j]) & EXPONENT) == EXPONENT)
    return I8(unfit)


@exported
def drawn(record: Any, expert: Any, step: Any, out: Any) -> Any:
    """Which entries of an expert's block a filter keeps that drops at random: out [count, size] uint8; returns 0.

    The record's scratch: 2 STRIP float32.
    """
    job = job_at(record)
    one = carray(pointer(job.filters), (job.steps,), FILTER)[step]
    draws = carray(pointer(one.draws), (job.count, 3), np.int64)[expert]
    for low in range(0, job.size, STRIP):
        kept = carray(pointer(out + expert * job.size + low), (min(STRIP, job.size - low),), np.uint8)
        _drawn(kept, draws[0], draws[1], draws[2], job.start + low, job.scratch)
    return 0


@exported
def elected(record: Any, step: Any, room: Any, out: Any) -> Any:
    """Which entries of a block a filter keeps that goes by an elected sign: out [count, size] uint8; returns 0.

    room  the address of (count + 4) STRIP float32
    """
    job = job_at(record)
    count, size = job.count, job.size
    one = carray(pointer(job.filters), (job.steps,), FILTER)[step]
    zero = np.float32(one.zero)
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        # Strips as in `masked_merge`, whose election this is: voices; then base, elected, and two for noise.
        origin, signs = strip(room, count, n), strip(room, count + 1, n)
        decode(job.base, job.base_kind, low, origin)
        for i in range(count):
            voice = strip(room, i, n)
            task_vector(job, i, low, voice, origin)
            filtered(voice, job, step, i, low, room + 4 * STRIP * (count + 2))
            _trimmed(voice, job, one, i)
            if i == 0:
                for j in range(n):
                    signs[j] = voice[j]
            else:
                for j in range(n):
                    signs[j] += voice[j]
        for j in range(n):
            sign = np.float32(signs[j] > np.float32(0)) - np.float32(signs[j] < np.float32(0))
            signs[j] = zero if sign == np.float32(0) else sign
        for i in range(count):
            # What was trimmed is 0 and has no sign, so that it is not kept.
            voice = strip(room, i, n)
            kept = carray(pointer(out + i * size + low), (n,), np.uint8)
            for j in range(n):
                kept[j] = voice[j] * signs[j] > np.float32(0)
    return 0
