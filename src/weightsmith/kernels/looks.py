"""How the kernels take the looks of measuring passes, over stored bits.

There is a backend for each description in `core.kernel`.  It is fed the blocks of one tensor in row order and gives,
for every look it was made for, what `Pass.see` adds up to in torch.  Looks of one kind go together: any number of cuts
is counted in one pass over the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from weightsmith.core.kernel import (
    Balance,
    Filter,
    Lengths,
    Look,
    Magnitudes,
    Masses,
    Products,
    Program,
    Ranked,
    Within,
)
from weightsmith.kernels.cuts import Cells, Inside, magnitudes
from weightsmith.kernels.job import Job, Results
from weightsmith.kernels.merge import Merge
from weightsmith.kernels.stored import READ, Stored, base_address, kernel, row_products, wide

__all__ = ["Backend", "Sight", "backends"]

State = dict[str, Any]
L = TypeVar("L", bound=Look, covariant=True)


@dataclass(frozen=True)
class Sight(Generic[L]):
    """A look that is to be taken, and what is known to take it.

    index   of the stage that asks: what it looks at has gone through the filters before it
    found, noise  see `Job`
    again   whether the same rows will be gone over once more
    joined  makes what the backend has seen of rows that are to be joined (`core.pass_.Rows`)
    """

    look: L
    program: Program
    index: int
    count: int
    found: Results
    noise: Sequence[np.ndarray | None]
    joined: Callable[[np.ndarray], Any]
    again: bool = False

    @property
    def filters(self) -> tuple[Filter, ...]:
        """What the task vectors have gone through."""
        return self.program.before[: self.index]

    @property
    def ordered(self) -> bool:
        """Whether one of them counts on the way."""
        return any(one.cut is not None for one in self.filters)

    def job(self, own: bool = False) -> Job:
        """A walk; own: with the masks of the stage that asks."""
        return Job(self.program.before[: self.index + own], self.count, self.found, self.noise, self.again)


class Backend(Protocol):
    """A pass over one tensor for some looks."""

    def add(self, stored: Stored, offset: int) -> int:
        """The next block, whose first entry has this flat position; how many inputs are NaN or Inf."""

    def results(self) -> list[State]:
        """What has been seen, look by look."""


def backends(sights: Sequence[Sight[Look]]) -> list[tuple[Backend, list[int]]]:
    """Backends for some looks, and which of them each takes."""
    alike: dict[tuple[type, Hashable], list[int]] = {}
    for i, sight in enumerate(sights):
        # The same kind of look behind the same filters sees the same numbers.
        alike.setdefault((type(sight.look), sight.filters), []).append(i)
    out: list[tuple[Backend, list[int]]] = []
    for (kind, _), places in alike.items():
        for group in [places] if kind in TOGETHER else [[i] for i in places]:
            out.append((BACKENDS[kind]([sights[i] for i in group]), group))
    return out


class _High:
    """Counts of the upper bits of all magnitudes: the same for every cut."""

    def __init__(self, sights: Sequence[Sight[Ranked]]) -> None:
        self._looks = len(sights)
        self._cells, self._job = Cells([()] * sights[0].count), sights[0].job()

    def add(self, stored: Stored, offset: int) -> int:
        self._cells.add(self._job.block(stored, offset), stored.size)
        return 0

    def results(self) -> list[State]:
        high = self._cells.high
        # int64 [n, HIGH], whatever the cuts: they are chosen from it afterwards.
        return [{"high": high}] * self._looks


class _Low:
    """Counts of the lower bits, within the values of the upper bits that all the looks name."""

    def __init__(self, sights: Sequence[Sight[Within]]) -> None:
        self._wanted = [sight.look.cells for sight in sights]  # [looks][n]
        self._job, one = sights[0].job(), len(sights) == 1
        # Of a single look all but some per cent of the entries are passed by.
        self._cells = Inside(self._wanted[0]) if one else Cells(list(zip(*self._wanted, strict=True)))

    def add(self, stored: Stored, offset: int) -> int:
        self._cells.add(self._job.block(stored, offset), stored.size)
        return 0

    def results(self) -> list[State]:
        return [{"low": self._cells.low(cells)} for cells in self._wanted]


class _Magnitudes:
    """|delta| of all entries of a vector."""

    def __init__(self, sights: Sequence[Sight[Magnitudes]]) -> None:
        (one,) = sights
        self._job, self._count, self._joined, self._found = one.job(), one.count, one.joined, list[np.ndarray]()

    def add(self, stored: Stored, offset: int) -> int:
        self._found.append(np.stack([magnitudes(self._job, stored, offset, i) for i in range(self._count)]))
        return 0

    def results(self) -> list[State]:
        # Bits of magnitudes are non-negative float32 numbers: [n, m].
        return [{"sizes": self._joined(np.concatenate(self._found, -1).view(np.float32))}]


class _Masses:
    """sum |delta| per row, before and after a filter."""

    def __init__(self, sights: Sequence[Sight[Masses]]) -> None:
        (one,) = sights
        self._job, self._count = one.job(own=True), one.count
        self._joined, self._found = one.joined, list[np.ndarray]()

    def add(self, stored: Stored, offset: int) -> int:
        rows, width = stored.shape
        found = np.empty((2, self._count, rows))  # float64
        record = self._job.block(stored, offset)
        bad = 0
        for i in range(self._count):
            whole, left = found[0, i].ctypes.data, found[1, i].ctypes.data
            bad += kernel("row_masses")(record, i, whole, left, rows, width, wide(2, width))
        self._found.append(found)
        return bad

    def results(self) -> list[State]:
        whole, masked = np.concatenate(self._found, -1)
        return [{"whole": self._joined(whole), "masked": self._joined(masked)}]


class _Products:
    """Inner products of what is mixed, row by row."""

    def __init__(self, sights: Sequence[Sight[Products]]) -> None:
        one, *_ = sights
        self._mix, self._joined, self._found = one.look.mix, one.joined, list[np.ndarray]()

    def add(self, stored: Stored, offset: int) -> int:
        # Differences are formed row by row in the kernel, never as a block.
        base = base_address(stored) if self._mix.deltas and stored.base is not None else None
        inputs = stored.ends if self._mix.ends else stored
        kinds = [READ[dtype] for dtype in inputs.dtypes]
        found, bad = row_products([bits.ctypes.data for bits in inputs.experts], kinds, stored.shape, base)
        self._found.append(found)
        return bad

    def results(self) -> list[State]:
        return [{"products": self._joined(np.concatenate(self._found, -1))}]


class _Lengths:
    """Squares of the merged task vector and of all that went into it, row by row."""

    def __init__(self, sights: Sequence[Sight[Lengths]]) -> None:
        (one,) = sights
        self._merge = Merge(one.program.at(one.index), one.found, one.noise, bare=True)
        self._joined, self._found = one.joined, list[np.ndarray]()

    def add(self, stored: Stored, offset: int) -> int:
        made, bad = self._merge.merge(stored, "float32", offset)
        squares, _ = row_products([made.ctypes.data], [READ["float32"]], stored.shape)
        base, found = base_address(stored), [squares]
        for bits, dtype in zip(stored.experts, stored.dtypes, strict=True):
            found.append(row_products([bits.ctypes.data], [READ[dtype]], stored.shape, base)[0])
        self._found.append(np.concatenate(found))
        return bad

    def results(self) -> list[State]:
        return [{"squares": self._joined(np.concatenate(self._found, -1))}]


class _Balance:
    """The sum of the signs that a merge elects."""

    def __init__(self, sights: Sequence[Sight[Balance]]) -> None:
        (one,) = sights
        # A filter elects by itself, before what combines.
        self._merge = Merge(one.program.electing(one.index), one.found, one.noise)

    def add(self, stored: Stored, offset: int) -> int:
        return self._merge.count_signs(stored, offset)

    def results(self) -> list[State]:
        return [{"signs": self._merge.signs}]


BACKENDS: Mapping[type, Callable[[Sequence[Sight[Any]]], Backend]] = {
    Ranked: _High, Within: _Low, Magnitudes: _Magnitudes, Masses: _Masses, Products: _Products, Lengths: _Lengths,
    Balance: _Balance,
}  # fmt: skip
TOGETHER = (Ranked, Within)
"""Looks that one backend takes for all who ask it behind the same filters."""
