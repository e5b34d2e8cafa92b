"""The kernels' filter that drops at random, small entries of a row more often: ranks, as far as they have a say."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from weightsmith.kernels.filters import filtered, job_at, philox, task_vector
from weightsmith.kernels.loops import MAGNITUDE, OPTIONS, decode, exported, more, pointer, strip
from weightsmith.kernels.record import CELLS, FILTER, STRIP

__all__ = ["sloped"]


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _limit(low: Any, span: Any, rank: Any) -> Any:
    """`ops.noise.limit` of the probability low + span rank, a float32 as torch has it."""
    # float32 first, as torch computes it; the product with 2^32 is exact in float64.
    share = low + span * rank
    return np.uint64(np.rint(np.float64(share) * 4294967296.0))


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _rest(key0: Any, key1: Any, place: Any, room: Any) -> Any:
    """The lower 16 bits of one number of a stream."""
    # A step of Philox makes 16 numbers of 16 bits: the block of this place, of which one is used.
    philox(key0, key1, 1, place >> 4, 1, carray(pointer(room), (4,), np.uint64))
    return np.uint64(carray(pointer(room), (16,), np.uint16)[place & 15])


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _below(upper: Any, limit: Any, key0: Any, key1: Any, place: Any, room: Any) -> Any:
    """Whether a number of a stream, whose upper 16 bits are known, lies below a limit."""
    top = np.uint64(upper)
    # Of 65536 cases all but one are settled by the upper half.
    if top != limit >> np.uint64(16):
        return top < limit >> np.uint64(16)
    return _rest(key0, key1, place, room) < limit & np.uint64(0xFFFF)


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _sorted_ranks(bits: Any, ranks: Any, keys: Any, places: Any, counts: Any) -> None:
    """ranks[j] becomes how many entries come before the j-th by rising bits, equals by index: all uint32 [m].

    Three rounds of a radix sort; keys [2, m] and places [2, m] and counts [2048] are scratch.
    """
    m = bits.size
    for j in range(m):
        keys[0, j], places[0, j] = bits[j], j
    # 32 bits in three digits of 11: 2048 counters stay in the nearest cache, 65536 (two digits) would not.
    for turn in range(3):
        shift, source = np.uint32(11 * turn), turn & 1
        for k in range(2048):
            counts[k] = np.uint32(0)
        for j in range(m):
            counts[(keys[source, j] >> shift) & np.uint32(2047)] += np.uint32(1)
        total = np.uint32(0)
        for k in range(2048):
            here = counts[k]
            counts[k] = total  # where the entries of this digit begin
            total += here
        for j in range(m):
            digit = (keys[source, j] >> shift) & np.uint32(2047)
            at = counts[digit]
            counts[digit] = at + np.uint32(1)
            keys[1 - source, at], places[1 - source, at] = keys[source, j], places[source, j]
    for j in range(m):
        ranks[places[1, j]] = j


_OCTAVES = np.uint32(6 << 23)
"""How far below a row's largest entry, as float bits, sizes are told apart: what is smaller is a few per cent."""


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _counted(bits: Any, tops: Any, cell: Any, place: Any, table: Any) -> None:
    """Put the bits of m entries into cells of rising size: cell [m], and place [m] within it, by index; uint32.

    table  [4, CELLS + 2] uint32, for each cell: entries in it, the upper 16 bits of the limits of its first and last
           one; the rest is for `_exact`

    The first cell is for zeros, the second for what is far below the largest.  Places are unsigned: of signed ones
    numba tests whether they are negative, which takes half as long again.
    """
    m: Any = bits.size
    held, lowest, highest = table[0], table[1], table[2]
    least: Any = np.uint32(0xFFFFFFFF)
    most: Any = np.uint32(0)
    for j in range(m):
        least = min(least, np.uint32(bits[j] - np.uint32(1)))  # wraps where there is nothing
        most = max(most, bits[j])
    if most > _OCTAVES:
        least = max(least, np.uint32(most - _OCTAVES))
    shift: Any = np.uint32(13)
    # Half as many cells as entries: a cell holds two on average, and the table stays small.
    room = min(max(64, m >> 1), CELLS)
    # Coarser, until all that are told apart fit.
    while np.int32(most >> shift) - np.int32(least >> shift) + 2 > room:
        shift = np.uint32(shift + np.uint32(1))
    before = np.int32(np.int32(least >> shift) - np.int32(1)) if most else np.int32(0)
    cells = np.int32(most >> shift) - before + 1 if most else 1
    held[:cells], table[3, :cells] = np.uint32(0), UNKNOWN
    for j in range(m):
        own: Any = np.int32(np.int32(bits[j] >> shift) - before)
        # Two loops, not one: this one has no counters and is vectorised.
        cell[j] = np.uint32(max(own, np.int32(min(bits[j], np.uint32(1)))))
    for j in range(m):
        at = cell[j]
        here = held[at]
        # By index within the cell: where a cell holds one value, place is already the rank within it.
        place[j] = here
        held[at] = more(here, True)
    total, final = np.uint32(0), np.uint32(m - 1)
    for k in range(cells):
        # Limits rise with the rank, so those of a cell lie between those of its first and its last entry.
        lowest[k] = tops[min(total, final)]
        total = np.uint32(total + held[k])
        highest[k] = tops[max(total, np.uint32(1)) - np.uint32(1)]  # of an empty cell it does not matter


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _exact(bits: Any, cell: Any, place: Any, table: Any, j: Any) -> Any:
    """(the rank of the j-th entry from 0, equals by index; 1 where all entries had to be looked at).

    table  see `_counted`; at [3] how many come before a cell whose entries are equal, or UNKNOWN
    """
    own, here = bits[j], cell[j]
    # The zeros of a sparse row, or coarse steps, lie in a cell of their own: looked at once, known for all.
    if table[3, here] != UNKNOWN:
        return table[3, here] + place[j], 0
    smaller, equal = np.uint32(0), np.uint32(0)
    for k in range(bits.size):
        smaller = more(smaller, bits[k] < own)
        equal = more(equal, bits[k] == own)
    # All of the cell are equals: remembered.
    if equal == table[0, here]:
        table[3, here] = smaller
        return smaller + place[j], 1
    # Its equals before it, by index.
    for k in range(j):
        smaller = more(smaller, bits[k] == own)
    return smaller, 1


UNKNOWN = np.uint32(0xFFFFFFFF)

_SCANS = 128
"""Looks at all entries of a row that cost as much as sorting it."""


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _along(
    bits: Any, upper: Any, kept: Any, limits: Any, tops: Any, key0: Any, key1: Any, start: Any, inner: Any, cell: Any,
    place: Any, table: Any, middle: Any, keys: Any, places: Any, room: Any,
) -> None:  # fmt: skip
    """Decide which of the m entries of one row stay.

    A number below all limits, or above them, decides without a rank; else the cell of an entry mostly says enough of
    its rank.  What is left is counted out, or the row is sorted where that happens often.

    bits, upper, kept  [m]: uint32, uint16, uint8; limits [m] uint64, rising; tops [m] uint32, their upper 16 bits
    start, inner       the flat position of the first entry, and how far apart they lie
    cell, place, table, middle, keys, places, room  scratch
    """
    m = bits.size
    least = tops[0]
    span = np.uint32(tops[m - 1] - least)  # limits rise
    for j in range(m):
        kept[j] = np.uint32(upper[j]) < least
    some = np.uint32(0)
    for j in range(np.uint32(m)):
        # Written in any case and counted on only if wanted: no branch, which could not be predicted.
        middle[some] = j
        some = more(some, np.uint32(np.uint32(upper[j]) - least) <= span)
    if some == 0:
        return
    _counted(bits, tops, cell, place, table)
    lowest, highest = table[1], table[2]
    left = np.uint32(0)
    for at in range(some):
        j = middle[at]
        top, here = np.uint32(upper[j]), cell[j]
        # Below the limits of the whole cell, or above them: no rank is needed.
        below = top < lowest[here]
        kept[j] = below
        middle[left] = j
        left = more(left, (not below) & (top <= highest[here]))
    scans, ordered = 0, False
    for at in range(left):
        j = middle[at]
        if ordered:
            rank = cell[j]
        else:
            rank, scanned = _exact(bits, cell, place, table, j)
            scans += scanned
        kept[j] = _below(upper[j], limits[rank], key0, key1, start + j * inner, room)
        # Rows of few distinct values: from here on ranks come from a sort.
        if scans > _SCANS and not ordered:
            _sorted_ranks(bits, cell, keys, places, carray(pointer(room + 64), (2048,), np.uint32))
            ordered = True


@exported
def sloped(record: Any, expert: Any, step: Any, room: Any, out: Any) -> Any:
    """Which entries of an expert's block a filter by rank keeps: out [count, size] uint8; returns 0.

    room  the address of 60 width + 120000 bytes; width: the entries of a row of the first axis
    """
    job = job_at(record)
    one = carray(pointer(job.filters), (job.steps,), FILTER)[step]
    columns, inner, size, start = one.columns, one.inner, job.size, job.start
    key = carray(pointer(one.draws), (job.count, 3), np.int64)[expert]
    slope = carray(pointer(one.slopes), (job.count, 2), np.float32)[expert]
    key0, key1, least, span = key[0], key[1], slope[0], slope[1]
    kept = carray(pointer(out + expert * size), (size,), np.uint8)
    # Ranks go along the second axis; a row of the first axis has columns x inner entries.
    width = 1 if one.ranks else columns * inner
    fixed = 4 * 2048 + 128 + 4 * 4 * (CELLS + 2)
    small, table = room, carray(pointer(room + 4 * 2048 + 128), (4, CELLS + 2), np.uint32)
    upper = carray(pointer(room + fixed), (16 * ((STRIP + width + 47) >> 4),), np.uint16)
    free = room + fixed + 32 * ((STRIP + width + 47) >> 4)
    if one.ranks:
        # Of a vector, whose ranks were measured: any piece of it may come.
        ranks = carray(pointer(one.ranks + 4 * expert * one.numel), (one.numel,), np.float32)
        for low in range(0, size, STRIP):
            n = min(STRIP, size - low)
            place = start + low
            lane, steps = place & 15, ((place & 15) + n + 15) >> 4
            philox(key0, key1, 0, place >> 4, steps, carray(pointer(room + fixed), (4 * steps,), np.uint64))
            for j in range(n):
                limit = _limit(least, span, ranks[place + j])
                kept[low + j] = _below(upper[lane + j], limit, key0, key1, place + j, small)
        return 0
    limits, tops = (
        carray(pointer(free), (columns,), np.uint64),
        carray(pointer(free + 8 * columns), (columns,), np.uint32),
    )
    for k in range(columns):
        rank = np.float32(k) / np.float32(columns - 1) if columns > 1 else np.float32(0.5)
        # k / (m - 1) as float32, like torch: the same limit, the same mask.
        limits[k] = _limit(least, span, rank)
        tops[k] = np.uint32(limits[k] >> np.uint64(16))
    free += 12 * columns
    bits = carray(pointer(free), (width,), np.uint32)
    values = carray(pointer(free), (width,), np.float32)
    own = carray(pointer(free + 4 * width), (columns,), np.uint32)
    cell = carray(pointer(free + 8 * width), (columns,), np.uint32)
    order = carray(pointer(free + 12 * width), (columns,), np.uint32)
    middle = carray(pointer(free + 16 * width), (columns + 1,), np.uint32)
    keys = carray(pointer(free + 20 * width + 8), (2, columns), np.uint32)
    places = carray(pointer(free + 28 * width + 8), (2, columns), np.uint32)
    numbers = carray(pointer(free + 36 * width + 8), (columns,), np.uint16)
    stays = carray(pointer(free + 38 * width + 8), (columns,), np.uint8)
    for row in range(size // width):
        at = row * width
        for low in range(0, width, STRIP):
            n = min(STRIP, width - low)
            value, origin = values[low : low + n], strip(job.scratch, 0, n)
            decode(job.base, job.base_kind, at + low, origin)
            task_vector(job, expert, at + low, value, origin)
            # What earlier filters leave is ranked, not the task vector.
            filtered(value, job, step, expert, at + low, job.scratch + 4 * STRIP)
        for j in range(width):
            bits[j] = bits[j] & MAGNITUDE
        place = start + at
        lane, steps = place & 15, ((place & 15) + width + 15) >> 4
        philox(key0, key1, 0, place >> 4, steps, carray(pointer(room + fixed), (4 * steps,), np.uint64))
        # Rows of a matrix are contiguous; of a convolution every inner-th entry belongs together.
        if inner == 1:
            _along(bits, upper[lane : lane + width], kept[at : at + width], limits, tops, key0, key1, place, 1, cell,
                   order, table, middle, keys, places, small)  # fmt: skip
            continue
        for side in range(inner):
            for k in range(columns):
                own[k], numbers[k] = bits[side + k * inner], upper[lane + side + k * inner]
            _along(own, numbers, stays, limits, tops, key0, key1, place + side, inner, cell, order, table, middle, keys,
                   places, small)  # fmt: skip
            for k in range(columns):
                kept[at + side + k * inner] = stays[k]
    return 0
