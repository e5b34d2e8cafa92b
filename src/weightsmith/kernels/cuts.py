"""Exact cuts by magnitude over a tensor or a model, counted by the kernels.

The torch form in `ops.select` is the meaning; this finds the same in fewer passes and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightsmith.kernels.job import Job
from weightsmith.kernels.ranks import EVERYTHING, NOTHING, buckets, locate, thresholds
from weightsmith.kernels.record import HIGH, LOW
from weightsmith.kernels.stored import Stored, kernel

__all__ = ["Cells", "Entries", "Inside", "magnitudes", "readings", "tensor_cuts"]

SAMPLE, PLACES = 1 << 16, 64
"""Entries looked at for a first guess of a cut, and on how many places of a large tensor they lie."""

MARGIN = 0.007
"""How far, as a share of all entries, the cut may lie from where the sample has it: three to four standard errors."""

BINS = 1 << 17
"""Most counters per expert.  A window of float bits this wide spans 1.5% of a number; one pass mostly is enough where
values come in steps, as the deltas of bf16 files do."""

_ALL_BITS = 1 << 31
_MOST = (1 << 32) - 1  # what a counter of a search can hold


@dataclass
class _Search:
    """An expert's cut: the `rank`-th largest |delta|'s bits lie in low .. low + (width << shift), or it is found."""

    rank: int
    low: int = 0
    width: int = 0
    shift: int = 0
    found: tuple[int, int, int] | None = None  # threshold, quota, ties

    def look(self, low: int, high: int) -> None:
        """Look into low .. high, in bins as narrow as there may be."""
        self.low, self.shift = low, max(0, (high - low - 1).bit_length() - (BINS.bit_length() - 1))
        self.width = -(-(high - low) >> self.shift)

    def digest(self, above: int, counts: np.ndarray, lost: np.ndarray) -> None:
        """Take the next step from one pass: how many lie above all bins; in each; the bits of each that were lost."""
        left = self.rank - above
        # The cut is above the window, or below it.
        if not 0 < left <= int(counts.sum()):
            self.look(0, _ALL_BITS)  # the guess was wrong
            return
        place, quota, ties = (int(found[0]) for found in locate(counts.astype(np.int64), np.array([left])))
        low = self.low + (place << self.shift)
        if lost[place]:  # mostly a bin holds one value: deltas of bf16 files come in steps
            self.look(low, low + (1 << self.shift))
        else:
            # A bin of one value: its lower end is the value.
            self.found = low, quota, ties


Read = Callable[[int, int], Stored]
"""Rows start..stop of a entries."""


@dataclass(frozen=True)
class Entries:
    """What is ranked: what filters leave of the task vectors of one entries.

    shape    (rows, entries per row)
    read     rows start..stop of the inputs
    blocks   row ranges that cover it
    walk     begins a walk over the blocks
    ordered  one of the filters counts on the way, so that no walk may leave rows out
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Stored]
    blocks: Sequence[tuple[int, int]]
    walk: Callable[[], Job]
    ordered: bool = False

    def look(self) -> Iterator[tuple[int, int]]:
        """The records of all blocks and their entries, one after the other."""
        job = self.walk()
        for start, stop in self.blocks:
            stored = self.read(start, stop)
            yield job.block(stored, start * self.shape[1]), stored.size
            # Two blocks at once would double the memory of the pass.
            del stored  # the next one is as large

    def magnitudes(self, pieces: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Those of some rows, for each expert."""
        job, found = self.walk(), list[list[np.ndarray]]()
        for start, stop in pieces:
            stored, offset = self.read(start, stop), start * self.shape[1]
            found.append([magnitudes(job, stored, offset, i) for i in range(len(stored.experts))])
        return [np.concatenate(one) for one in zip(*found, strict=True)]


def tensor_cuts(ranks: Sequence[Sequence[int]], entries: Entries) -> np.ndarray:
    """Threshold, quota and ties (see `ranks.thresholds`) of the cuts after the ranks[i][c] largest |delta_i| of a
    tensor: int64 [n, cuts, 3].

    Always exact.  One cut per expert is found near where a sample has it, mostly in one pass; several, those of a
    sweep's variants among them, by two passes for all of them, see `Cells`.
    """
    # A sample would be all of it.
    if entries.shape[0] * entries.shape[1] <= SAMPLE:
        return _sorted(ranks, entries)
    if _guesses(ranks, entries.shape, entries.ordered):
        return _one_each(ranks, entries)
    return _several(ranks, entries)


def readings(ranks: Sequence[Sequence[int]], shape: tuple[int, int], ordered: bool = False) -> float:
    """How often `tensor_cuts` reads the tensor, if its first guess is good; a part for the sample."""
    if shape[0] * shape[1] <= SAMPLE:
        return 1.0
    if _guesses(ranks, shape, ordered):
        return 1 + sum(stop - start for start, stop in _sample(*shape)) / shape[0]
    return 2.0


def _guesses(ranks: Sequence[Sequence[int]], shape: tuple[int, int], ordered: bool) -> bool:
    # A sample reads some rows only, which a filter that counts on the way does not allow.
    return not ordered and max(len(set(wanted)) for wanted in ranks) == 1 and shape[0] * shape[1] <= _MOST


def _sorted(ranks: Sequence[Sequence[int]], entries: Entries) -> np.ndarray:
    """The cuts of a small entries."""
    found = np.zeros((len(ranks), len(ranks[0]), 3), np.int64)
    for i, (wanted, bits) in enumerate(zip(ranks, entries.magnitudes([(0, entries.shape[0])]), strict=True)):
        # Bits of magnitudes are in their order: uint32.
        rising = np.sort(bits)
        for at, rank in enumerate(wanted):
            if 0 < rank < rising.size:
                threshold = rising[rising.size - rank]
                first, behind = np.searchsorted(rising, threshold, "left"), np.searchsorted(rising, threshold, "right")
                found[i, at] = threshold, rank - (rising.size - behind), behind - first
            else:
                found[i, at, 0] = NOTHING if rank <= 0 else EVERYTHING
    return found


def _several(ranks: Sequence[Sequence[int]], entries: Entries) -> np.ndarray:
    # Two passes for any number of cuts: upper bits, then the lower ones within every cut's bucket.
    bucket, left = buckets(_counted([()] * len(ranks), entries).high, ranks)
    cells = _counted(bucket.tolist(), entries)
    found = np.zeros((*bucket.shape, 3), np.int64)
    for i, cut in np.ndindex(*bucket.shape):  # not all at once: their counters are copied several times
        low = cells.within(i, int(bucket[i, cut]))[None, None]
        one = thresholds(low, bucket[i : i + 1, cut : cut + 1], left[i : i + 1, cut : cut + 1])
        found[i, cut] = [value.item() for value in one]
    return found


def _one_each(ranks: Sequence[Sequence[int]], entries: Entries) -> np.ndarray:
    """A sample says about where a cut lies; one pass counts what lies above and, value by value, what lies near.

    If the cut is not there, or equal values are spread too widely, further passes narrow it down.
    """
    rows, width = entries.shape
    searches = [_Search(rank) for rank, *_ in ranks]
    for search in searches:
        # All, or nothing: no look at the tensor.
        if search.rank <= 0 or search.rank >= rows * width:
            search.found = (NOTHING if search.rank <= 0 else EVERYTHING), 0, 0
    if not all(s.found for s in searches):
        for search, sampled in zip(searches, entries.magnitudes(_sample(rows, width)), strict=True):
            if search.found is None:
                _guess(search, sampled, rows * width)
    # Experts whose cut is found take part no more.
    while open_ := [(i, search) for i, search in enumerate(searches) if search.found is None]:
        # Counts, and the bits that differ within a bin: uint32 [2, bins].
        counts = [np.zeros((2, search.width), np.uint32) for _, search in open_]
        above = [0] * len(open_)
        for record, _ in entries.look():
            for at, (i, search) in enumerate(open_):
                above[at] += kernel("count_between")(
                    record, i, search.low, search.width, search.shift, counts[at].ctypes.data
                )
        for at, (_, search) in enumerate(open_):
            search.digest(above[at], *counts[at])
    return np.array([[search.found] * len(wanted) for search, wanted in zip(searches, ranks, strict=True)], np.int64)


def _sample(rows: int, width: int) -> list[tuple[int, int]]:
    """Row ranges of the sample, in PLACES pieces."""
    # 64 places spread over the rows, which may be in an order (tokens by frequency).
    deep = max(1, SAMPLE // PLACES // width)
    starts = sorted({place * rows // PLACES for place in range(PLACES)})
    return [(start, min(start + deep, rows)) for start in starts]


def _guess(search: _Search, sample: np.ndarray, total: int) -> None:
    size = sample.size
    place = size - round(search.rank * size / total)  # of the cut, among the sample in rising order
    # A share p of a sample of 65536 has a standard error of at most 0.2%.
    margin = int(MARGIN * size) + 1
    first, last = max(place - margin, 0), min(place + margin, size - 1)
    ordered = np.partition(sample, sorted({first, last}))
    search.look(0 if first == 0 else int(ordered[first]), int(ordered[last]) + 1)


class Cells:
    """Counts of all magnitudes by their upper 15 bits; of those in a cell that is opened, by all 31 bits.

    One pass over a tensor serves any number of cuts.

    opened  for each expert, values of the upper bits; those that no magnitude has stand for cuts that need none
    """

    def __init__(self, opened: Sequence[Iterable[int]]) -> None:
        self._places = [
            {cell: HIGH + LOW * at for at, cell in enumerate(dict.fromkeys(c for c in cells if 0 <= c < HIGH))}
            for cells in opened
        ]
        # HIGH counters of closed cells, then LOW for every open one.
        self._counts = [np.zeros(HIGH + LOW * len(places), np.int64) for places in self._places]
        self._tables = [_table(places) for places in self._places]

    def add(self, record: int, size: int) -> None:
        """Count the next block, of `size` entries."""
        for i, (table, counts) in enumerate(zip(self._tables, self._counts, strict=True)):
            kernel("count_cells")(record, i, 0 if table is None else table.ctypes.data, counts.ctypes.data)

    @property
    def high(self) -> np.ndarray:
        """Where no cell is open, all counts: int64 [n, HIGH], as `ranks` takes them."""
        # Of closed cells only; of an open one the counters lie elsewhere.
        return np.stack([counts[:HIGH] for counts in self._counts])

    def low(self, cells: Iterable[int]) -> np.ndarray:
        """`within` one cell of every expert: int64 [n, 1, LOW], as `ranks` takes them."""
        return np.stack([self.within(i, cell) for i, cell in enumerate(cells)])[:, None]

    def within(self, expert: int, cell: int) -> np.ndarray:
        """The counts in an open cell of an expert, 0 in one that no magnitude has: int64 [LOW]."""
        place = self._places[expert].get(int(cell))
        return np.zeros(LOW, np.int64) if place is None else self._counts[expert][place : place + LOW]


def _table(places: Mapping[int, int]) -> np.ndarray | None:
    """Where the kernel finds the counters of each cell, and whether it is open; None where none is."""
    if not places:
        return None
    table = np.zeros((2, HIGH), np.uint32)
    # A closed cell: its own counter, and no lower bits (mask 0).
    table[0] = np.arange(HIGH)
    for cell, place in places.items():
        table[:, cell] = place, LOW - 1
    return table


class Inside:
    """Counts of the magnitudes within one cell of every expert, by their lower 16 bits; the others pass by quickly.

    cells  values of the upper bits; those that no magnitude has stand for cuts that need none
    """

    def __init__(self, cells: Sequence[int]) -> None:
        self._cells = cells
        # The kernel's counters, and what it would note of bits that were shifted out: uint32.
        self._counts = np.zeros((len(cells), 2, LOW), np.uint32)
        self._low, self._left = np.zeros((len(cells), 1, LOW), np.int64), _MOST

    def add(self, record: int, size: int) -> None:
        """Count the next block, of `size` entries."""
        if size > self._left:
            self._fold()
        self._left -= size
        for i, cell in enumerate(self._cells):
            if 0 <= cell < HIGH:
                kernel("count_between")(record, i, cell * LOW, LOW, 0, self._counts[i].ctypes.data)

    def low(self, cells: Sequence[int]) -> np.ndarray:
        """Of its cells: int64 [n, 1, LOW], as `ranks` takes them."""
        assert cells == self._cells
        self._fold()
        return self._low

    def _fold(self) -> None:
        """Make room in the counters: over the whole of a long tensor 32 bits may not do."""
        self._low[:, 0] += self._counts[:, 0]
        self._counts[:], self._left = 0, _MOST


def _counted(opened: Sequence[Iterable[int]], entries: Entries) -> Cells:
    """`Cells` of all blocks."""
    cells = Cells(opened)
    for record, size in entries.look():
        cells.add(record, size)
    return cells


def magnitudes(job: Job, stored: Stored, offset: int, expert: int) -> np.ndarray:
    """The bits of an expert's |filtered task vector|: uint32, flat."""
    out = np.empty(stored.size, np.uint32)
    kernel("magnitudes")(job.block(stored, offset), expert, out.ctypes.data)
    return out
