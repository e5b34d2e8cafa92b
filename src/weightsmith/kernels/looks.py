"""How the kernels take the looks of measuring passes, over stored bits.

There is a backend for each description in `core.kernel`.  It is fed the blocks of one tensor in row order and gives,
for every look it was made for, what `Pass.see` adds up to in torch.  Looks of one kind go together: any number of cuts
is counted in one pass over the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from weightsmith.core.kernel import Balance, Look, Masses, Products, Program, Ranked, Within
from weightsmith.kernels.cuts import Cells
from weightsmith.kernels.merge import Masks, Merge, Results
from weightsmith.kernels.stored import READ, Stored, base_address, kernel, row_products, wide

__all__ = ["Backend", "Sight", "backends"]

State = dict[str, Any]


@dataclass(frozen=True)
class Sight:
    """A look that is to be taken, and what is known to take it.

    joined  makes what the backend has seen of rows that are to be joined (`core.pass_.Rows`)
    """

    look: Look
    program: Program
    count: int
    found: Results
    draws: np.ndarray | None
    joined: Callable[[np.ndarray], Any]


class Backend(Protocol):
    """A pass over one tensor for some looks."""

    def add(self, stored: Stored, offset: int) -> int:
        """The next block, whose first entry has this flat position; how many inputs are NaN or Inf."""

    def results(self) -> list[State]:
        """What has been seen, look by look."""


def backends(sights: Sequence[Sight]) -> list[tuple[Backend, list[int]]]:
    """Backends for some looks, and which of them each takes."""
    kinds: dict[type, list[int]] = {}
    for i, sight in enumerate(sights):
        kinds.setdefault(type(sight.look), []).append(i)
    out: list[tuple[Backend, list[int]]] = []
    for kind, places in kinds.items():
        for group in [places] if kind in TOGETHER else [[i] for i in places]:
            out.append((BACKENDS[kind]([sights[i] for i in group]), group))
    return out


class _High:
    """Counts of the upper bits of all magnitudes: the same for every cut."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        self._looks = len(sights)
        self._cells = Cells([()] * sights[0].count)

    def add(self, stored: Stored, offset: int) -> int:
        self._cells.add(stored)
        return 0

    def results(self) -> list[State]:
        high = self._cells.high
        return [{"high": high}] * self._looks


class _Low:
    """Counts of the lower bits, within the values of the upper bits that all the looks name."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        self._wanted = [sight.look.cells for sight in sights if isinstance(sight.look, Within)]
        self._cells = Cells(list(zip(*self._wanted, strict=True)))

    def add(self, stored: Stored, offset: int) -> int:
        self._cells.add(stored)
        return 0

    def results(self) -> list[State]:
        return [{"low": self._cells.low(cells)} for cells in self._wanted]


class _Masses:
    """sum |delta| per row, before and after a filter."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        (one,) = sights
        self._masks, self._count = Masks(one.program.before, one.count, one.found, one.draws), one.count
        self._joined, self._found = one.joined, list[np.ndarray]()

    def add(self, stored: Stored, offset: int) -> int:
        rows, width = stored.shape
        found = np.empty((2, self._count, rows))
        record = self._masks.block(stored, offset, 4)
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

    def __init__(self, sights: Sequence[Sight]) -> None:
        one, *_ = sights
        assert isinstance(one.look, Products)
        self._mix, self._joined, self._found = one.look.mix, one.joined, list[np.ndarray]()

    def add(self, stored: Stored, offset: int) -> int:
        base = base_address(stored) if self._mix.deltas and stored.base is not None else None
        inputs = stored.ends if self._mix.ends else stored
        kinds = [READ[dtype] for dtype in inputs.dtypes]
        found, bad = row_products([bits.ctypes.data for bits in inputs.experts], kinds, stored.shape, base)
        self._found.append(found)
        return bad

    def results(self) -> list[State]:
        return [{"products": self._joined(np.concatenate(self._found, -1))}]


class _Balance:
    """The sum of the signs that a merge elects."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        (one,) = sights
        self._merge = Merge(one.program, one.found, one.draws)

    def add(self, stored: Stored, offset: int) -> int:
        return self._merge.count_signs(stored, offset)

    def results(self) -> list[State]:
        return [{"signs": self._merge.signs}]


BACKENDS: Mapping[type, Callable[[Sequence[Sight]], Backend]] = {
    Ranked: _High, Within: _Low, Masses: _Masses, Products: _Products, Balance: _Balance,
}  # fmt: skip
TOGETHER = (Ranked, Within)
"""Looks that one backend takes for all who ask."""
