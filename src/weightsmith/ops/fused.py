"""Weighted sums and trimmed votes straight over the stored bytes, in float32 arithmetic.

The torch path in `methods/` is the meaning; this gives the same bytes several times faster, without torch
being imported at all.  Where there is neither numba nor what it once compiled (`ops.native`), `available()` is
False and the engine takes the torch path.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsmith.kernel import BF16, E4M3, E5M2, F16, F32, STRIP, TrimmedVote, WeightedSum
from weightsmith.ops import native
from weightsmith.ops.select import HIGH, LOW, keep_share, locate

__all__ = ["READ", "WRITTEN", "Counts", "Stored", "Vote", "available", "tensor_cuts", "weighted_sum"]

READ: Mapping[str, int] = {
    "bfloat16": BF16, "float32": F32, "float16": F16, "float8_e4m3fn": E4M3, "float8_e5m2": E5M2,
}  # fmt: skip
"""Dtypes that the kernels read; inputs of any other take the torch path."""

WRITTEN = ("bfloat16", "float32", "float16")
"""Dtypes that the kernels write."""


def available() -> bool:
    """Whether fused kernels can be used in this process."""
    return native.kernels() is not None


@dataclass(frozen=True)
class Stored:
    """Rows of every expert and of the base, equally shaped arrays of stored bits, and their dtypes.

    `base` is None where it is not plain stored data (or not there at all).
    """

    experts: Sequence[np.ndarray]
    dtypes: Sequence[str]
    base: np.ndarray | None = None
    base_dtype: str = "float32"

    def __getitem__(self, rows: slice) -> Stored:
        base = None if self.base is None else self.base[rows]
        return Stored([bits[rows] for bits in self.experts], self.dtypes, base, self.base_dtype)

    @property
    def size(self) -> int:
        return self.experts[0].size


def weighted_sum(spec: WeightedSum, stored: Stored, out_dtype: str) -> tuple[np.ndarray, int]:
    """Carry out a weighted sum; `stored.base` is needed where `spec.deltas`.

    Returns (bits of the result in `out_dtype`, how many of them are NaN or Inf).
    """
    out = _empty(stored, out_dtype)
    weights = np.array(spec.weights, np.float32)
    bad = _kernel("weighted_sum")(
        *_inputs(stored, weights), *_base(stored if spec.deltas else None), spec.divisor, spec.scale, spec.deltas,
        out.ctypes.data, READ[out_dtype], out.size, _scratch(3),
    )  # fmt: skip
    return out, bad


# --- trimmed votes -----------------------------------------------------------------------------------


class Vote:
    """`Ties.merge` over one tensor, block by block in row order.

    spec     the vote
    summary  what measuring found: `select.threshold`, `.quota`, `.ties` [n, 1] and, where needed, `ties.signs`
    """

    def __init__(self, spec: TrimmedVote, summary: Mapping[str, Any]) -> None:
        count = len(spec.weights)
        self._spec, self._zero = spec, _zero_sign(spec, summary) if "ties.signs" in summary else 1.0
        self._weights = np.array(spec.weights, np.float32)
        self._cuts, self._seen = np.zeros((3, count), np.int64), np.zeros(count, np.int64)
        self._signs = np.zeros(1, np.int64)
        if spec.trim:
            self._cuts[:] = [np.asarray(summary[f"select.{k}"])[:, 0] for k in ("threshold", "quota", "ties")]

    def merge(self, stored: Stored, out_dtype: str) -> tuple[np.ndarray, int]:
        """The next block: (bits of the result, how many inputs and results are NaN or Inf)."""
        out = _empty(stored, out_dtype)
        return out, self._run(stored, out.ctypes.data, READ[out_dtype])

    def count_signs(self, blocks: Iterable[Stored]) -> np.generic:
        """The sum of the elected signs over all blocks: int64 scalar."""
        for stored in blocks:
            self._run(stored, 0, F32)
        return np.int64(self._signs[0])

    def _run(self, stored: Stored, out: int, kind: int) -> int:
        spec = self._spec
        return _kernel("trimmed_vote")(
            *_inputs(stored, self._weights), *_base(stored), self._cuts.ctypes.data, self._seen.ctypes.data, spec.trim,
            self._zero, spec.mean, spec.scale, out, kind, self._signs.ctypes.data, stored.size,
            _scratch(len(self._weights) + 3),
        )  # fmt: skip


def _zero_sign(spec: TrimmedVote, summary: Mapping[str, Any]) -> float:
    if spec.zero == "plus" or int(summary["ties.signs"]) == 0:
        return 1.0
    majority = 1.0 if int(summary["ties.signs"]) > 0 else -1.0
    return majority if spec.zero == "majority" else -majority


# --- exact cuts over one tensor ----------------------------------------------------------------------

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
    spec: TrimmedVote, shape: tuple[int, int], read: Callable[[int, int], Stored], blocks: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """What `select.measure` and `select.digest` find over one tensor of shape (rows, entries per row).

    A sample says about where the cut lies; one pass counts what lies above and, value by value, what lies near.
    If the cut is not there, or equal values are spread too widely, further passes narrow it down: it is always exact.
    """
    rows, width = shape
    searches = [_Search(keep_share(rows * width, kept)) for kept in spec.kept]
    for search in searches:
        if search.rank >= rows * width:
            search.found = -1, 0, 0
    if not all(s.found for s in searches):
        pieces = _sample(rows, width)
        complete = len(pieces) == 1
        sampled = [read(*piece) for piece in pieces]
        for i, search in enumerate(searches):
            if search.found is None:
                _guess(search, np.concatenate([_magnitudes(stored, i) for stored in sampled]), rows * width, complete)
    while open_ := [i for i, search in enumerate(searches) if search.found is None]:
        counts = {i: np.zeros(searches[i].width + 1, np.uint32) for i in open_}
        above = dict.fromkeys(open_, 0)
        for block in blocks:
            stored = read(*block)
            for i in open_:
                above[i] += _count_between(stored, i, searches[i].low, searches[i].shift, counts[i])
        for i in open_:
            searches[i].digest(above[i], counts[i][:-1], int(counts[i][-1]))
    found = np.array([search.found for search in searches], np.int64)
    return {f"select.{name}": found[:, at : at + 1] for at, name in enumerate(("threshold", "quota", "ties"))}


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
    step     'high', 'low' or 'signs'
    summary  what earlier passes found
    """

    def __init__(self, spec: TrimmedVote, step: str, summary: Mapping[str, Any]) -> None:
        self._spec, self._step, self._summary = spec, step, summary

    def over(self, blocks: Iterable[Stored]) -> dict[str, Any]:
        """The totals, as `select.digest` and `Ties.digest` take them."""
        if self._step == "signs":
            return {"ties.signs": Vote(self._spec, self._summary).count_signs(blocks)}
        count = len(self._spec.weights)
        high = self._step == "high"
        counts = np.zeros((count, (HIGH if high else LOW) + 1), np.uint32)
        lowest = [0] * count if high else [int(b) << 16 for b in self._summary["select.bucket"][:, 0]]
        total = np.zeros((count, counts.shape[1] - 1), np.int64)
        for stored in blocks:
            for i in range(count):
                if 0 <= lowest[i] < _ALL_BITS:
                    _count_between(stored, i, lowest[i], 16 if high else 0, counts[i])
            total += counts[:, :-1]  # a block cannot overflow 32 bits, a tensor could
            counts[:] = 0
        return {f"select.{self._step}": total if high else total[:, None]}


# --- calling the kernels -----------------------------------------------------------------------------


def _kernel(name: str) -> Callable[..., int]:
    found = native.kernels()
    assert found is not None
    return found[name]


_SIZES = {"bfloat16": "u2", "float32": "u4", "float16": "u2"}


def _empty(stored: Stored, dtype: str) -> np.ndarray:
    return np.empty(stored.experts[0].shape, _SIZES[dtype])


def _inputs(stored: Stored, weights: np.ndarray) -> tuple[int, int, int, int]:
    """Addresses of: the experts' addresses, their kinds, their weights; and how many."""
    kept = _local.__dict__
    kept["addresses"] = np.array([bits.ctypes.data for bits in stored.experts], np.int64)
    kept["kinds"] = np.array([READ[dtype] for dtype in stored.dtypes], np.int64)
    return kept["addresses"].ctypes.data, kept["kinds"].ctypes.data, weights.ctypes.data, len(weights)


def _base(stored: Stored | None) -> tuple[int, int]:
    if stored is None:
        return 0, F32
    assert stored.base is not None
    return stored.base.ctypes.data, READ[stored.base_dtype]


def _magnitudes(stored: Stored, expert: int) -> np.ndarray:
    """The bits of an expert's |delta|: uint32, flat."""
    out = np.empty(stored.size, np.uint32)
    bits = stored.experts[expert]
    _kernel("magnitudes")(
        bits.ctypes.data, READ[stored.dtypes[expert]], *_base(stored), out.size, out.ctypes.data, _scratch(2)
    )
    return out


def _count_between(stored: Stored, expert: int, lowest: int, shift: int, counts: np.ndarray) -> int:
    """Add a block to counts [bins + 1]; see `kernels.count_between`."""
    bits = stored.experts[expert]
    return _kernel("count_between")(
        bits.ctypes.data, READ[stored.dtypes[expert]], *_base(stored), bits.size,
        lowest, counts.size - 1, shift, counts.ctypes.data, _scratch(2),
    )  # fmt: skip


_local = threading.local()
"""Arrays of this thread that a running kernel reads."""


def _scratch(strips: int) -> int:
    """The address of room for so many strips of float32, kept for the next block."""
    kept: dict[str, np.ndarray] = _local.__dict__
    if "scratch" not in kept or kept["scratch"].size < strips * STRIP:
        kept["scratch"] = np.empty(strips * STRIP, np.float32)
    return kept["scratch"].ctypes.data
