"""Merges straight over the stored bytes, in float32 arithmetic, as a `Program` says.

The torch path in `methods/` is the meaning; this gives the same bytes several times faster, without torch
being imported at all.  Where there is neither numba nor what it once compiled (`kernels.native`), `available()` is
False and the engine takes the torch path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith.core.kernel import F32, Drop, Mix, Program, TrimmedVote, WeightedSum, Window
from weightsmith.core.method import Rows
from weightsmith.kernels import native
from weightsmith.kernels.stored import (
    READ,
    Stored,
    base_address,
    empty,
    input_addresses,
    kernel,
    row_products,
    scratch,
    wide,
)
from weightsmith.ops.noise import limit

__all__ = ["Masses", "Merge", "Products", "available", "weighted_sum"]

Summary = Mapping[str, Any]
Streams = Sequence[tuple[int, int]]
"""The key of every expert's noise, in two signed 64-bit halves, see `noise.stream`."""


def available() -> bool:
    """Whether fused kernels can be used in this process."""
    return native.kernels() is not None


def weighted_sum(spec: WeightedSum, stored: Stored, out_dtype: str) -> tuple[np.ndarray, int]:
    """Carry out a weighted sum; `stored.base` is needed where `spec.deltas`.

    Returns (bits of the result in `out_dtype`, how many of them are NaN or Inf).
    """
    out = empty(stored, out_dtype)
    weights = np.array(spec.weights, np.float32)
    bad = kernel("weighted_sum")(
        *input_addresses(stored, weights), *base_address(stored if spec.deltas else None),
        spec.divisor, spec.scale, spec.deltas, out.ctypes.data, READ[out_dtype], out.size, scratch(3),
    )  # fmt: skip
    return out, bad


class _Masks:
    """What the filter in front does to each task vector of one tensor, block by block in row order."""

    def __init__(
        self, spec: TrimmedVote | Drop | Window | None, count: int, summary: Summary, streams: Streams
    ) -> None:
        trims = isinstance(spec, (Window, TrimmedVote)) and spec.trim
        found = [np.asarray(summary[f"select.{k}"]).T for k in ("threshold", "quota", "ties")] if trims else []
        # What lies in front of the last cut stays, what lies in front of the first of two does not.
        self._cuts = np.ascontiguousarray(np.stack(found, 1)[::-1]) if trims else np.zeros((0, 3, count), np.int64)
        self._seen = np.zeros((len(self._cuts), count), np.int64)
        self._draws: np.ndarray | None = None
        if isinstance(spec, Drop):
            below = limit(np.array(spec.shares)).astype(np.int64)
            self._draws = np.column_stack([np.array(streams, np.int64).reshape(-1, 2), below])

    def arguments(self, offset: int) -> tuple[int, ...]:
        """cuts, sides, seen, draws, start: as the kernels take them for a block whose first entry is the offset-th."""
        draws = 0 if self._draws is None else self._draws.ctypes.data
        return self._cuts.ctypes.data, len(self._cuts), self._seen.ctypes.data, draws, offset


class Merge:
    """A program over one tensor, block by block in row order.

    program  what to do
    summary  what measuring found: `select.threshold`, `.quota`, `.ties` [n, cuts]; `l1.factors` [n]; `ties.signs`;
             `mix.shares` [n]
    streams  of the noise, where something is dropped at random
    """

    def __init__(self, program: Program, summary: Summary, streams: Streams = ()) -> None:
        combine, before, after = program.combine, program.before, program.after
        self._program = program
        if isinstance(combine, Mix):
            self._sum = WeightedSum(tuple(float(share) for share in summary["mix.shares"]), deltas=combine.deltas)
            return
        self._sum = combine if isinstance(combine, WeightedSum) else WeightedSum(combine.weights, 1.0, combine.scale)
        count = len(combine.weights)
        vote = combine if isinstance(combine, TrimmedVote) else None
        self._weights = np.array(combine.weights, np.float32)
        self._masks = _Masks(before or vote, count, summary, streams)
        self._factors = self._shares = self._strict = None
        if before is not None and before.rescale == "l1":
            self._factors = np.asarray(summary["l1.factors"]).astype(np.float32)
        if isinstance(before, Drop) and before.rescale == "expectation":
            self._shares = np.array(before.shares, np.float32)
        if after is not None:
            self._strict = np.array(after.strict, np.float32)
        self._zero = _zero_sign(vote, summary) if vote is not None and "ties.signs" in summary else 1.0
        self._signs = np.zeros(1, np.int64)

    def merge(self, stored: Stored, out_dtype: str, offset: int = 0) -> tuple[np.ndarray, int]:
        """The next block: (bits of the result, how many inputs and results are NaN or Inf).

        offset  the flat position of its first entry
        """
        if isinstance(self._program.combine, Mix):
            return _mixed(self._program.combine, self._sum, stored, out_dtype)
        if not self._program.masks:
            return weighted_sum(self._sum, stored, out_dtype)
        out = empty(stored, out_dtype)
        return out, self._run(stored, offset, out.ctypes.data, READ[out_dtype])

    def add(self, stored: Stored, offset: int) -> int:
        """Count the elected signs of the next block; returns how many inputs are NaN or Inf."""
        return self._run(stored, offset, 0, F32)

    def result(self) -> dict[str, Any]:
        """What has been counted: int64 scalar."""
        return {"ties.signs": np.int64(self._signs[0])}

    def _run(self, stored: Stored, offset: int, out: int, kind: int) -> int:
        combine, after, total = self._program.combine, self._program.after, self._sum
        factors, shares, strict = (
            0 if x is None else x.ctypes.data for x in (self._factors, self._shares, self._strict)
        )
        return kernel("masked_merge")(
            *input_addresses(stored, self._weights), *base_address(stored), *self._masks.arguments(offset),
            factors, shares, isinstance(combine, TrimmedVote), self._zero,
            isinstance(combine, TrimmedVote) and combine.mean, total.divisor, total.scale,
            strict, after.k if after else 0, after.scale if after else 1.0,
            out, kind, self._signs.ctypes.data, stored.size, scratch(len(self._weights) + 4),
        )  # fmt: skip


def _mixed(spec: Mix, total: WeightedSum, stored: Stored, out_dtype: str) -> tuple[np.ndarray, int]:
    if stored.base is None:
        total = replace(total, deltas=False)
    return weighted_sum(total, stored.ends if spec.ends else stored, out_dtype)


def _zero_sign(spec: TrimmedVote, summary: Summary) -> float:
    if spec.zero == "plus" or int(summary["ties.signs"]) == 0:
        return 1.0
    majority = 1.0 if int(summary["ties.signs"]) > 0 else -1.0
    return majority if spec.zero == "majority" else -majority


# --- measuring ---------------------------------------------------------------------------------------


class Masses:
    """`rescale.l1_sums` of one tensor, block by block in row order: what a filter leaves of every row's L1 norm."""

    def __init__(self, spec: Drop | Window, count: int, summary: Summary, streams: Streams) -> None:
        self._masks, self._count = _Masks(spec, count, summary, streams), count
        self._found: list[np.ndarray] = []

    def add(self, stored: Stored, offset: int) -> int:
        """The next block; returns how many inputs are NaN or Inf."""
        rows, width = stored.shape
        found = np.empty((2, self._count, rows))
        bad = 0
        for i, bits in enumerate(stored.experts):
            bad += kernel("row_masses")(
                bits.ctypes.data, READ[stored.dtypes[i]], *base_address(stored), i, self._count,
                *self._masks.arguments(offset), found[0, i].ctypes.data, found[1, i].ctypes.data,
                rows, width, scratch(4), wide(2, width),
            )  # fmt: skip
        self._found.append(found)
        return bad

    def result(self) -> dict[str, Any]:
        whole, masked = np.concatenate(self._found, -1)
        return {"l1.whole": Rows(whole), "l1.masked": Rows(masked)}


class Products:
    """`gram.measure` of what is mixed, block by block in row order."""

    def __init__(self, spec: Mix) -> None:
        self._spec = spec
        self._found: list[np.ndarray] = []

    def add(self, stored: Stored, offset: int) -> int:
        """The next block; returns how many inputs are NaN or Inf."""
        base = base_address(stored) if self._spec.deltas and stored.base is not None else None
        inputs = stored.ends if self._spec.ends else stored
        kinds = [READ[dtype] for dtype in inputs.dtypes]
        found, bad = row_products([bits.ctypes.data for bits in inputs.experts], kinds, stored.shape, base)
        self._found.append(found)
        return bad

    def result(self) -> dict[str, Any]:
        return {"gram.products": Rows(np.concatenate(self._found, -1))}
