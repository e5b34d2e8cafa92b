"""The record of a walk over one tensor: its inputs block by block, and the filters that task vectors go through."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from weightsmith.core.kernel import Filter, sign_of_zero
from weightsmith.kernels.record import CELLS, FILTER, MERGE, STRIP
from weightsmith.kernels.stored import READ, Stored, base_address, kernel, room

__all__ = ["Job", "Results"]

Results = Mapping[int, Mapping[Any, Any]]
"""Stage index -> the results of its passes on one tensor."""


class Job:
    """A walk over the blocks of one tensor, in row order; what is counted on the way begins anew with each.

    filters  what task vectors go through, the i-th as stage i says
    noise    of the filters that drop at random, see `ops.noise.draws`
    found    results of the stages' passes
    again    the same rows will be gone over once more: what filters keep is remembered, a bit for each entry
    """

    def __init__(
        self,
        filters: Sequence[Filter],
        count: int,
        found: Results,
        noise: Sequence[np.ndarray | None],
        again: bool = False,
    ) -> None:
        # One packed record: its fields have names, where 26 arguments had places.
        self.record = np.zeros(1, MERGE)
        self._kept: dict[Hashable, np.ndarray] = {}  # what addresses point at
        self._count, self._stages, self._again = count, tuple(filters), again
        self._which: list[Hashable] = []
        self._filters = np.zeros(len(filters), FILTER)
        for step, (one, known) in enumerate(zip(filters, [*noise, None], strict=False)):
            self._fill(step, one, found.get(step, {}), known)
            self._which.append((self._stages[: step + 1], *self._measured(step)))
        self.record["filters"], self.record["steps"] = self._filters.ctypes.data, len(filters)

    def _fill(self, step: int, one: Filter, found: Mapping[Any, Any], noise: np.ndarray | None) -> None:
        cuts = np.zeros((0, 3, self._count), np.int64)
        if one.cut is not None:
            ends = found[one.cut]
            # What comes before the last cut stays, what comes before the first of two does not.
            cuts = np.stack([ends.threshold.T, ends.quota.T, ends.ties.T], 1)[::-1]
        self._set(step, "cuts", np.ascontiguousarray(cuts))
        # Equals met so far, per cut and expert: they are numbered over the whole walk.
        self._set(step, "seen", np.zeros((len(cuts), self._count), np.int64))
        self._filters[step]["sides"] = len(cuts)
        if one.factors is not None and one.factors in found:  # not yet while they are measured
            with np.errstate(over="ignore"):  # Inf as in torch; the merge then counts what is not finite
                self._set(step, "factors", np.asarray(found[one.factors]).astype(np.float32))
        if one.values:
            self._set(step, "factors", np.array(one.values, np.float32))
        if noise is not None:
            # The hash of a stream's name is made once per tensor, not per block.
            self._set(step, "draws", np.ascontiguousarray(noise))
        if one.vote is not None and one.vote.signs in found:
            self._filters[step]["zero"] = int(sign_of_zero(one.vote.zero, found[one.vote.signs]))
        if one.divide:
            self._set(step, "shares", np.array(one.shares, np.float32))
        if one.spans:
            # Low end and span of the probabilities: float32 [n, 2], as torch adds them.
            self._set(step, "slopes", np.column_stack([one.shares, one.spans]).astype(np.float32))
            if one.ranks in found:
                ranks = np.ascontiguousarray(found[one.ranks], np.float32)
                self._set(step, "ranks", ranks)
                self._filters[step]["numel"] = ranks.shape[1]

    def _measured(self, step: int) -> list[Hashable]:
        """What was measured for filters, up to one: it decides with them what that one keeps."""
        fields = [(i, field) for i in range(step + 1) for field in ("cuts", "factors") if i < step or field == "cuts"]
        # The filter's own factors come after: they are not known yet where they are measured.
        arrays = [self._kept[one].tobytes() for one in fields if one in self._kept]
        return [*arrays, *self._filters["zero"][: step + 1].tolist()]

    def _set(self, step: int, field: str, values: np.ndarray) -> None:
        # Kept: the record holds an address, which keeps nothing alive.
        self._kept[step, field] = values
        self._filters[step][field] = values.ctypes.data

    def point(self, field: str, values: np.ndarray) -> None:
        """Let an address of the record point at an array, which is kept."""
        self._kept[field] = values
        self.record[field] = values.ctypes.data

    def kept(self, field: str) -> np.ndarray:
        """What `point` has kept."""
        return self._kept[field]

    def block(self, stored: Stored, offset: int, strips: int = 4) -> int:
        """Fill in the next block, whose first entry has the flat position `offset`; the record's address."""
        self.point("inputs", np.array([bits.ctypes.data for bits in stored.experts], np.int64))
        self.point("kinds", np.array([READ[dtype] for dtype in stored.dtypes], np.int64))
        record = self.record
        record["count"], record["size"], record["start"] = len(stored.experts), stored.size, offset
        record["base"], record["base_kind"] = base_address(stored)
        record["scratch"] = room("scratch", strips * STRIP, np.float32)
        for step, one in enumerate(self._stages):
            if one.marks:
                self._mark(step, stored)
        return record.ctypes.data

    def _mark(self, step: int, stored: Stored) -> None:
        """Find out, or remember, what a filter keeps of a block."""
        one = self._stages[step]
        # The masks of earlier passes over the same rows: a bit per entry instead of a sort.
        packed = stored.kept.get(self._which[step])
        if packed is not None:
            self._set(step, "kept", packed)
            return
        self._filters[step]["kept"] = 0
        if stored.size == 0 or not (self._again or one.spans or one.vote is not None):
            return  # noise can be drawn strip by strip
        # The kernels walk through earlier filters to see what they leave, and count equals on their way.
        met = [seen.copy() for seen in self._seen]
        packed = np.packbits(self._found(step, one, stored))
        for seen, before in zip(self._seen, met, strict=True):
            seen[:] = before  # the walk itself has yet to see this block
        stored.kept[self._which[step]] = packed
        self._set(step, "kept", packed)

    def _found(self, step: int, one: Filter, stored: Stored) -> np.ndarray:
        """What a filter keeps: uint8 [n, m]."""
        address, kept = self.record.ctypes.data, np.empty((self._count, stored.size), np.uint8)
        out = kept.ctypes.data
        if one.vote is not None:
            kernel("elected")(address, step, room("elected", (self._count + 4) * STRIP, np.float32), out)
            return kept
        for expert in range(self._count):
            if one.spans:
                kernel("sloped")(address, expert, step, self._ranking(step, stored), out)
            else:
                kernel("drawn")(address, expert, step, out)
        return kept

    def _ranking(self, step: int, stored: Stored) -> int:
        """Say along which axis of a block ranks go; the address of room for them."""
        rest = stored.experts[0].shape[1:]
        # Along the second axis, as in torch.
        self._filters[step]["columns"] = rest[0] if rest else 1
        self._filters[step]["inner"] = math.prod(rest[1:])
        return room("slope", 60 * math.prod(rest) + 4 * 6 * CELLS + (1 << 15), np.uint8)

    @property
    def _seen(self) -> list[np.ndarray]:
        return [self._kept[step, "seen"] for step in range(len(self._stages))]
