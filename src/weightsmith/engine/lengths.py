"""How long a merged change is beside the experts' own: measured on a sample of the rows, from what is read anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.site import Site
from weightsmith.core.task import Task
from weightsmith.io.read.source import numbers
from weightsmith.kernels.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Kept", "Sample", "sampled_rows"]

PIECES, ENTRIES = 8, 1 << 17
"""A sample of a tensor: so many ranges of rows, evenly spread, of so many entries of all experts together (of a quarter
each, where they are few), and at least a row each."""

_DIGITS = {"float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2}
"""Bits behind the point."""


def sampled_rows(key: Key, experts: int, start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges of rows that stand for a tensor (all of it where it is small), as far as they lie in start..stop."""
    wide = max(1, ENTRIES // max(experts, 4) // (PIECES * max(key.row_numel, 1)))
    ranges = [(0, key.rows)]
    if wide * PIECES < key.rows:
        starts = ((2 * i + 1) * key.rows // (2 * PIECES) - wide // 2 for i in range(PIECES))
        ranges = [(low, low + wide) for low in starts]
    here = ((max(low, start), min(high, stop)) for low, high in ranges)
    return [(low, high) for low, high in here if low < high]


class Kept:
    """The sampled rows of task vectors that are read one at a time.

    Their room is made once: small pieces left between large ones would keep the memory of those from being given back.
    """

    def __init__(self, key: Key, experts: int, start: int, stop: int) -> None:
        ranges = sampled_rows(key, experts, start, stop) if key.shape else []
        self._ranges = [(low - start, high - start) for low, high in ranges]
        self._at = {low: sum(high - low for low, high in ranges[:i]) for i, (low, _) in enumerate(ranges)}
        self._long = {low: high - low for low, high in ranges}
        self._experts, self._seen = experts, set[int]()
        self._held: Tensor | None = None

    def keep(self, index: int, task: Tensor) -> None:
        """Keep the sample of a task vector's rows."""
        if index in self._seen or not self._ranges:
            return
        if self._held is None:
            self._held = task.new_empty((self._experts, sum(self._long.values()), *task.shape[1:]))
        at = 0
        for low, high in self._ranges:
            self._held[index, at : at + high - low] = task[low:high]
            at += high - low
        self._seen.add(index)

    def rows(self, count: int, low: int) -> list[Tensor] | None:
        """Of all task vectors, the range that begins at a row; None where one of them was not read."""
        if self._held is None or low not in self._at or len(self._seen) < count:
            return None
        at = self._at[low]
        return [self._held[i, at : at + self._long[low]] for i in range(count)]


class Sample:
    """What a task makes of sampled rows, beside the task vectors there; nothing where there is no base."""

    def __init__(self, task: Task, experts: int) -> None:
        merges = task.pipeline is not None and task.pipeline.codec is None and experts > 1
        self._wanted = merges and all(key.shape for key in task.keys)
        self._found: dict[str, tuple[Key, list[tuple[int, np.ndarray]]]] = {}

    def of_stored(self, key: Key, start: int, out: np.ndarray, stored: Stored) -> None:
        """Rows that the kernels made; out: their bits."""
        base = stored.base
        if not self._wanted or base is None:
            return
        for low, high in sampled_rows(key, len(stored.experts), start, start + len(out)):
            here = slice(low - start, high - start)
            old, new = numbers(base[here], stored.base_dtype), numbers(out[here], key.dtype)
            tasks = [
                numbers(bits[here], dtype) - old for bits, dtype in zip(stored.experts, stored.dtypes, strict=True)
            ]
            coarser = DTYPES[key.dtype].itemsize < DTYPES[stored.base_dtype].itemsize
            self._add(key, low, new - old, tasks, _rounding(new, key.dtype) if coarser else 0.0)

    def of_site(self, key: Key, out: Tensor, site: Site) -> None:
        """A block that torch made; out: before it is cast."""
        if not self._wanted or site.base is None:
            return
        for low, high in sampled_rows(key, site.count, site.start, site.start + len(out)):
            here = slice(low - site.start, high - site.start)
            tasks = _tasks(site, here, low)
            if tasks is not None:
                self._add(key, low, _flat(out[here] - site.base[here]), [_flat(task) for task in tasks], 0.0)

    def _add(self, key: Key, start: int, merged: np.ndarray, tasks: Sequence[np.ndarray], noise: float) -> None:
        """Keep the squares of every row: sums over rows are then the same however the tensor was cut."""
        every = np.stack([merged, np.sum(tasks, 0), *tasks]).reshape(2 + len(tasks), -1, max(key.row_numel, 1))
        squares = np.square(every).sum(-1)  # [2 + n, rows]
        squares[0] = np.maximum(squares[0] - noise / squares.shape[1], 0.0)
        self._found.setdefault(key.name, (key, []))[1].append((start, squares))

    def squares(self) -> list[float]:
        """|merged|^2, |sum_i tau_i|^2, and every |tau_i|^2, as of the whole tensors; [] where there is no sample."""
        found = []
        for key, pieces in self._found.values():
            rows = np.concatenate([squares for _, squares in sorted(pieces, key=lambda piece: piece[0])], -1)
            found.append(rows.sum(-1) * (key.rows / rows.shape[-1]))
        total: list[float] = np.sum(found, 0).tolist() if found else []
        return total


def _tasks(site: Site, here: slice, low: int) -> Sequence[Tensor] | None:
    """Some rows of every task vector; None where they are no longer there."""
    if site.factors:
        return [left[here] @ right for left, right in site.factors]
    if len(site.each):
        kept: Kept = site.each.kept  # type: ignore[attr-defined]
        return kept.rows(len(site.each), low)
    return [one[here] if site.is_delta or site.base is None else one[here] - site.base[here] for one in site.stack]


def _flat(rows: Tensor) -> np.ndarray:
    found: np.ndarray = rows.detach().double().cpu().numpy().reshape(-1)
    return found


def _rounding(values: np.ndarray, dtype: str) -> float:
    """What rounding to a coarser dtype adds to a sum of squares, on average: ulp^2 / 12 for each entry."""
    _, exponent = np.frexp(values)
    return float(np.square(np.ldexp(1.0, exponent - 1 - _DIGITS.get(dtype, 23))).sum() / 12)
