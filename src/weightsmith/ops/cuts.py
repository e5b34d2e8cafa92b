"""Exact cuts by magnitude over a tensor or a model, counted by the kernels.

The torch path in `ops.select` is the meaning; this finds the same in fewer passes and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsmith.kernel import TrimmedVote
from weightsmith.ops.select import EVERYTHING, HIGH, LOW, NOTHING, locate
from weightsmith.ops.stored import READ, Stored, base_address, kernel, scratch

__all__ = ["Counts", "tensor_cuts"]

SAMPLE, PLACES = 1 << 16, 64
"""Entries looked at for a first guess of a cut, and on how many places of a large tensor they lie."""

MARGIN = 0.007
"""How far, as a share of all entries, the cut may lie from where the sample has it: three to four standard errors."""

BINS = 1 << 18
"""Most counters per expert.  A window of float bits this wide spans 3% of a number: one pass mostly is enough."""

_ALL_BITS = 1 << 31


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

    def digest(self, above: int, counts: np.ndarray, rest: int) -> None:
        """Take the next step from the counts of one pass: how many lie above all bins, in each, off their edges."""
        left = self.rank - above
        if not 0 < left <= int(counts.sum()):
            self.look(0, _ALL_BITS)  # the guess was wrong
            return
        place, quota, ties = (int(found[0]) for found in locate(counts.astype(np.int64), np.array([left])))
        low = self.low + (place << self.shift)
        if self.shift and rest:  # bins as wide as the steps between values (deltas of bf16 files) hold one value each
            self.look(low, low + (1 << self.shift))
        else:
            self.found = low, quota, ties


def tensor_cuts(
    ranks: Sequence[Sequence[int]],
    shape: tuple[int, int],
    read: Callable[[int, int], Stored],
    blocks: Sequence[tuple[int, int]],
) -> Generator[None, None, dict[str, Any]]:
    """What `select.measure` and `select.digest` find for the cuts behind the ranks[i][c] largest |delta_i| of a tensor.

    A sample says about where a cut lies; one pass counts what lies above and, value by value, what lies near.
    If the cut is not there, or equal values are spread too widely, further passes narrow it down: it is always exact.
    Pauses after every block.

    shape  (rows, entries per row) of the tensor
    read   rows start..stop of it
    """
    rows, width = shape
    searches = [(i, _Search(rank)) for i, wanted in enumerate(ranks) for rank in wanted]
    for _, search in searches:
        if search.rank <= 0 or search.rank >= rows * width:
            search.found = (NOTHING if search.rank <= 0 else EVERYTHING), 0, 0
    if not all(s.found for _, s in searches):
        pieces = _sample(rows, width)
        sampled = []
        for piece in pieces:
            sampled.append(read(*piece))
            yield
        for i in range(len(ranks)):
            seen = np.concatenate([_magnitudes(stored, i) for stored in sampled])
            for of, search in searches:
                if of == i and search.found is None:
                    _guess(search, seen, rows * width, complete=len(pieces) == 1)
    while open_ := [(i, search) for i, search in searches if search.found is None]:
        counts = [np.zeros(search.width + 1, np.uint32) for _, search in open_]
        above = [0] * len(open_)
        for block in blocks:
            stored = read(*block)
            for at, (i, search) in enumerate(open_):
                above[at] += _count_between(stored, i, search.low, search.shift, counts[at])
            del stored
            yield
        for at, (_, search) in enumerate(open_):
            search.digest(above[at], counts[at][:-1], int(counts[at][-1]))
    found = np.array([search.found for _, search in searches], np.int64).reshape(len(ranks), -1, 3)
    return {f"select.{name}": found[..., at] for at, name in enumerate(("threshold", "quota", "ties"))}


def _sample(rows: int, width: int) -> list[tuple[int, int]]:
    """Row ranges of the sample: all rows of a small tensor, else PLACES pieces."""
    if rows * width <= SAMPLE:
        return [(0, rows)]
    deep = max(1, SAMPLE // PLACES // width)
    starts = sorted({place * rows // PLACES for place in range(PLACES)})
    return [(start, min(start + deep, rows)) for start in starts]


def _guess(search: _Search, sample: np.ndarray, total: int, complete: bool) -> None:
    size = sample.size
    place = size - round(search.rank * size / total)  # of the cut, among the sample in rising order
    margin = 0 if complete else int(MARGIN * size) + 1
    first, last = max(place - margin, 0), min(place + margin, size - 1)
    ordered = np.partition(sample, sorted({first, last}))
    search.look(0 if first == 0 and not complete else int(ordered[first]), int(ordered[last]) + 1)


class Counts:
    """One measuring pass of a model-wide trimmed vote over a tensor: what `Ties.measure` finds, without torch.

    spec     the vote
    step     'high' or 'low'
    summary  what earlier passes found
    """

    def __init__(self, spec: TrimmedVote, step: str, summary: Mapping[str, Any]) -> None:
        count, self._step, self._high = len(spec.weights), step, step == "high"
        self._counts = np.zeros((count, (HIGH if self._high else LOW) + 1), np.uint32)
        self._lowest = [0] * count if self._high else [int(b) << 16 for b in summary["select.bucket"][:, 0]]
        self._total = np.zeros((count, self._counts.shape[1] - 1), np.int64)

    def add(self, stored: Stored, offset: int) -> int:
        """Count the next block; the inputs are looked at where they are merged."""
        for i, lowest in enumerate(self._lowest):
            if 0 <= lowest < _ALL_BITS:
                _count_between(stored, i, lowest, 16 if self._high else 0, self._counts[i])
        self._total += self._counts[:, :-1]  # a block cannot overflow 32 bits, a tensor could
        self._counts[:] = 0
        return 0

    def result(self) -> dict[str, Any]:
        """The totals, as `select.digest` takes them."""
        return {f"select.{self._step}": self._total if self._high else self._total[:, None]}


def _magnitudes(stored: Stored, expert: int) -> np.ndarray:
    """The bits of an expert's |delta|: uint32, flat."""
    out = np.empty(stored.size, np.uint32)
    bits = stored.experts[expert]
    kernel("magnitudes")(
        bits.ctypes.data, READ[stored.dtypes[expert]], *base_address(stored), out.size, out.ctypes.data, scratch(2)
    )
    return out


def _count_between(stored: Stored, expert: int, lowest: int, shift: int, counts: np.ndarray) -> int:
    """Add a block to counts [bins + 1]; see `kernels.count_between`."""
    bits = stored.experts[expert]
    return kernel("count_between")(
        bits.ctypes.data, READ[stored.dtypes[expert]], *base_address(stored), bits.size,
        lowest, counts.size - 1, shift, counts.ctypes.data, scratch(2),
    )  # fmt: skip
