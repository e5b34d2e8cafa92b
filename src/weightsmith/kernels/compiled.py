"""The kernels, as numba compiles them; `kernels.native` keeps the machine code.

Every kernel takes addresses and sizes and works through its block in strips of STRIP entries: an input's strip is
decoded to float32, used, and overwritten by the next one's, so that all of it stays in a core's own cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import carray, njit

from weightsmith.kernels.by_rank import sloped
from weightsmith.kernels.filters import drawn, elected, filtered, job_at, masked, task_vector
from weightsmith.kernels.loops import (
    I8,
    MAGNITUDE,
    OPTIONS,
    as_bits,
    as_float,
    decode,
    encode,
    exported,
    fold,
    more,
    pointer,
    strip,
)
from weightsmith.kernels.record import HIGH, STRIP
from weightsmith.kernels.sums import dots, row_products, row_sizes, weighted_sum, weighted_sums

__all__ = ["KERNELS"]


# --- cuts -------------------------------------------------------------------------------------------


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _voice(job: Any, expert: Any, low: Any, n: Any) -> Any:
    """A strip of an expert's filtered task vector, as the looks see it: the first one of the scratch space."""
    value, origin = strip(job.scratch, 0, n), strip(job.scratch, 1, n)
    decode(job.base, job.base_kind, low, origin)
    task_vector(job, expert, low, value, origin)
    # Room for random numbers begins behind the two strips: 4 bytes x 2 STRIP.
    filtered(value, job, job.steps, expert, low, job.scratch + 8 * STRIP)
    return value


@exported
def magnitudes(record: Any, expert: Any, out: Any) -> Any:
    """The bits of |filtered task vector|: out [size] uint32.  Returns 0; the record's scratch: 4 STRIP float32."""
    job = job_at(record)
    found = carray(pointer(out), (job.size,), np.uint32)
    for low in range(0, job.size, STRIP):
        value = _voice(job, expert, low, min(STRIP, job.size - low))
        # A sum as an index is tested for being negative, entry by entry.
        here = found[low : low + value.size]
        for j in range(value.size):
            here[j] = as_bits(value[j]) & MAGNITUDE
    return 0


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _without_zeros(value: Any) -> Any:
    """Where a strip holds many zeros, bring the others to its front; returns how many are left, and how many went.

    All zeros have one counter, and to add to it again and again takes several times as long as to others in turn.
    """
    zeros, left = np.uint32(0), np.uint32(0)
    for j in range(value.size):
        zeros = more(zeros, value[j] == np.float32(0))
    if 4 * zeros < value.size:
        return I8(value.size), I8(0)
    for j in range(value.size):
        value[left] = value[j]
        left = more(left, value[j] != np.float32(0))
    return I8(left), I8(zeros)


_GROUP = 16


@exported
def count_between(record: Any, expert: Any, lowest: Any, width: Any, shift: Any, counts: Any) -> Any:
    """Histogram of the bits of |filtered task vector| from `lowest` on; returns how many lie above.

    counts[(bits - lowest) >> shift] += 1 for bits in lowest .. lowest + (width << shift); counts [2 width] uint32,
    whose second half gains, bin by bin, the bits that `shift` has shifted out.  The record's scratch: as above.
    """
    job = job_at(record)
    found = carray(pointer(counts), (2 * width,), np.uint32)
    first, span, down = np.uint32(lowest), np.uint32(min(width << shift, 0xFFFFFFFF)), np.uint32(shift)
    lost = np.uint32((1 << shift) - 1)
    above = 0
    for low in range(0, job.size, STRIP):
        n = min(STRIP, job.size - low)
        value = _voice(job, expert, low, n)
        over, zeros = np.uint32(0), np.uint32(0)
        for j in range(n):
            bits = as_bits(value[j]) & MAGNITUDE
            place = np.uint32(bits - first)  # wraps to something large where bits < first
            over = more(over, np.uint32(bits >= first) & np.uint32(place >= span))
            zeros = more(zeros, bits == np.uint32(0))
            # The strip is not needed any more and holds the places; zeros, often many, are counted at once.
            value[j] = as_float(place if bits else np.uint32(0xFFFFFFFF))
        above += I8(over)
        # They lie in the window only where it begins with them.
        if first == 0:
            found[0] += zeros
        # The window holds some per cent of a tensor: most groups of sixteen are passed by with one test.
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
def count_cells(record: Any, expert: Any, cells: Any, counts: Any) -> Any:
    """Count every |entry| of a filtered task vector by its bits: all in one pass, however many cells are open.

    cells   [2, 2^15] uint32, for each value of the upper 16 bits: where its counters begin, and 0xFFFF where the lower
            16 bits are told apart as well, else 0.  0: they are nowhere, and the counters are in order
    counts  int64, as many as the cells ask for
    Returns 0; the record's scratch: as above.
    """
    job = job_at(record)
    first, apart = carray(pointer(cells), (HIGH,), np.uint32), carray(pointer(cells + 4 * HIGH), (HIGH,), np.uint32)
    found = carray(pointer(counts), (HIGH,), np.int64)  # and what comes behind
    for low in range(0, job.size, STRIP):
        value = _voice(job, expert, low, min(STRIP, job.size - low))
        n, zeros = _without_zeros(value)
        if cells == 0:
            found[0] += zeros
            for j in range(n):
                found[(as_bits(value[j]) & MAGNITUDE) >> np.uint32(16)] += 1
            continue
        found[first[0]] += zeros
        for j in range(n):
            bits = as_bits(value[j]) & MAGNITUDE
            cell = bits >> np.uint32(16)
            # No branch: a closed cell has one counter (mask 0), an open one 65536.
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
def _agreeing(base: Any, agree: Any, count: Any, k: Any, scratch: Any, address: Any, kind: Any, low: Any) -> None:
    """Zero the entries of the first strip, tau, that fewer than k task masks |delta| > agree |tau - delta| select."""
    n = base.size
    tau, value, votes = strip(scratch, 0, n), strip(scratch, count + 1, n), strip(scratch, count + 2, n)
    for j in range(n):
        # Counts in float32: exact up to 2^24 experts, and of the vectors' width.
        votes[j] = np.float32(0)
    for i in range(count):
        decode(address[i], kind[i], low, value)
        strict = agree[i]
        for j in range(n):
            delta = value[j] - base[j]
            votes[j] += np.float32(abs(delta) > abs(tau[j] - delta) * strict)
    for j in range(n):
        tau[j] = tau[j] if votes[j] >= k else np.float32(0)


@exported
def masked_merge(record: Any) -> Any:
    """Filter task vectors, weigh and combine them; returns how many inputs and results are NaN or Inf.

    The record's fields (`MERGE`) beside the block's:

    filters  what each task vector goes through, see `filters.filtered`
    vote     elect signs as `Ties.merge` does, `zero` where there is none, and divide by the agreeing weights if `mean`;
             else the sum is divided by `divisor`
    agree    [count] float32 or 0: of the scaled result tau stays what k task masks select, times `after`
    bare     the result is the merged task vector, without the base
    signs    [1] int64 gains the sum of the elected signs.  With `out` 0 that is all that is done.
    scratch  (count + 4) STRIP float32
    """
    job = job_at(record)
    count, size, scratch = job.count, job.size, job.scratch
    base, base_kind, out, out_kind = job.base, job.base_kind, job.out, job.out_kind
    agree, k = job.agree, job.k
    vote, mean, zero, divisor, scale, after = job.vote, job.mean, job.zero, job.divisor, job.scale, job.after
    address, kind = carray(pointer(job.inputs), (count,), np.int64), carray(pointer(job.kinds), (count,), np.int64)
    weight = carray(pointer(job.weights), (count,), np.float32)
    strict = carray(pointer(agree), (count,), np.float32)
    majority = carray(pointer(job.signs), (1,), np.int64)
    # Strips 0 .. count - 1: votes; then base, elected, and two for noise or the agreeing weights.
    room = scratch + 4 * STRIP * (count + 2)
    bad = 0
    for low in range(0, size, STRIP):
        n = min(STRIP, size - low)
        origin, elected = strip(scratch, count, n), strip(scratch, count + 1, n)
        decode(base, base_kind, low, origin)
        for i in range(count):
            voice = strip(scratch, i, n)
            # Counted before the masks, which may hide a NaN.
            bad += task_vector(job, i, low, voice, origin)
            filtered(voice, job, job.steps, i, low, room)
            w = weight[i]
            if i == 0:
                for j in range(n):
                    voice[j] = voice[j] * w
                    elected[j] = voice[j]
            else:
                for j in range(n):
                    voice[j] = voice[j] * w
                    # In recipe order: the election is a sum, and its last bit decides ties.
                    elected[j] += voice[j]
        total = strip(scratch, 0, n)
        if vote:
            # 32 bits do for a strip of 2048, and are added twice as fast as 64.
            # Cut off again, as in `more`.
            balance = np.int32(0)
            for j in range(n):
                sign = np.int32(np.int32(elected[j] > np.float32(0)) - np.int32(elected[j] < np.float32(0)))
                balance = np.int32(balance + sign)
                elected[j] = zero if sign == 0 else np.float32(sign)
            majority[0] += I8(balance)
            # A pass that only counts signs stops here.
            if out == 0:
                continue
            agreeing = strip(scratch, count + 2, n)
            _combine(scratch, count, weight, elected, agreeing)
            if mean:
                for j in range(n):
                    # Where nobody agrees the sum is 0, and so is 0 / 1.
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
        if not job.bare:
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
    """Per row sum |delta| before and after the masks of the last filter; returns how many entries are NaN or Inf.

    record  as of `masked_merge`; scratch 4 STRIP float32
    expert  whose task vector; whole, left [rows] float64; wide [2, width] float64
    """
    job = job_at(record)
    scratch, last = job.scratch, job.steps - 1
    everything, some = carray(pointer(whole), (rows,), np.float64), carray(pointer(left), (rows,), np.float64)
    room = scratch + 4 * STRIP * 2
    before, after = carray(pointer(wide), (width,), np.float64), carray(pointer(wide + 8 * width), (width,), np.float64)
    bad = 0
    # A whole row in float64, folded in the order of `ops.reduce`, then the next one.
    for row in range(rows):
        for low in range(0, width, STRIP):
            n = min(STRIP, width - low)
            value, origin = strip(scratch, 0, n), strip(scratch, 1, n)
            place = row * width + low
            decode(job.base, job.base_kind, place, origin)
            bad += task_vector(job, expert, place, value, origin)
            filtered(value, job, last, expert, place, room)
            # Before the masks of the last filter, after them: its factors are not applied yet.
            _sizes(value, before[low : low + n])
            masked(value, job, last, expert, place, room)
            _sizes(value, after[low : low + n])
        everything[row], some[row] = fold(before), fold(after)
    return bad


KERNELS: Mapping[str, Any] = {
    f.__name__: f
    for f in (
        weighted_sum,
        weighted_sums,
        magnitudes,
        count_between,
        count_cells,
        masked_merge,
        row_masses,
        sloped,
        drawn,
        elected,
        row_products,
        dots,
        row_sizes,
    )
}
"""Name -> compiled C function."""
