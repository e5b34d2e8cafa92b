"""Merges straight over the stored bytes, in float32 arithmetic, as a `Program` says.

The torch path in `methods/` is the meaning; this gives the same bytes several times faster, without torch
being imported at all.  Where there is neither numba nor what it once compiled (`kernels.native`), `available()` is
False and the engine takes the torch path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith.core.kernel import Drop, Mix, Program, Vote, WeightedSum, Window, sign_of_zero
from weightsmith.kernels import native
from weightsmith.kernels.record import F32, MERGE
from weightsmith.kernels.stored import READ, Stored, base_address, empty, input_addresses, kernel, scratch

__all__ = ["Masks", "Merge", "available", "weighted_sum"]

Results = Mapping[Any, Any]
"""The results of all stages' passes on one tensor."""


def available() -> bool:
    """Whether the kernels can be used in this process."""
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


class Masks:
    """What a filter does to each task vector of one tensor, block by block in row order: the record's masking fields.

    draws  [count, 3] int64, see `ops.noise.draws`; None where nothing is dropped at random
    """

    def __init__(self, spec: Vote | Drop | Window | None, count: int, found: Results, draws: np.ndarray | None) -> None:
        self.record = np.zeros(1, MERGE)
        self._kept: dict[str, np.ndarray] = {}  # what the record's addresses point at
        cut = None if spec is None or isinstance(spec, Drop) else spec.cut
        cuts = np.zeros((0, 3, count), np.int64)
        if cut is not None:
            ends = found[cut]
            # What comes before the last cut stays, what comes before the first of two does not.
            cuts = np.stack([ends.threshold.T, ends.quota.T, ends.ties.T], 1)[::-1]
        self.point("cuts", np.ascontiguousarray(cuts))
        self.point("seen", np.zeros((len(cuts), count), np.int64))
        self.record["sides"] = len(cuts)
        if isinstance(spec, Drop) and draws is not None:
            self.point("draws", np.ascontiguousarray(draws))

    def point(self, field: str, values: np.ndarray) -> None:
        """Let an address of the record point at an array, which is kept."""
        self._kept[field] = values
        self.record[field] = values.ctypes.data

    def block(self, stored: Stored, offset: int, strips: int) -> int:
        """Fill in the next block, whose first entry has the flat position `offset`; the record's address."""
        self.point("inputs", np.array([bits.ctypes.data for bits in stored.experts], np.int64))
        self.point("kinds", np.array([READ[dtype] for dtype in stored.dtypes], np.int64))
        record = self.record
        record["count"], record["size"], record["start"] = len(stored.experts), stored.size, offset
        record["base"], record["base_kind"] = base_address(stored)
        record["scratch"] = scratch(strips)
        return record.ctypes.data


class Merge:
    """A program over one tensor, block by block in row order.

    found  results of the passes that the program names: cuts, factors, signs, shares
    """

    def __init__(self, program: Program, found: Results, draws: np.ndarray | None = None) -> None:
        self._program = program
        combine = program.combine
        if isinstance(combine, Mix):
            shares = tuple(float(share) for share in found[combine.shares])
            self._sum = WeightedSum(shares, deltas=combine.deltas)
        elif isinstance(combine, WeightedSum):
            self._sum = combine
        else:
            self._sum = WeightedSum(combine.weights, 1.0, combine.scale)
        if program.masks:
            self._masks = self._masked(program, found, draws)

    def _masked(self, program: Program, found: Results, draws: np.ndarray | None) -> Masks:
        """The record, but for the block's own fields."""
        combine, before, after, total = program.combine, program.before, program.after, self._sum
        vote = combine if isinstance(combine, Vote) else None
        masks = Masks(before or vote, len(total.weights), found, draws)
        masks.point("weights", np.array(total.weights, np.float32))
        masks.point("signs", np.zeros(1, np.int64))
        if before is not None and before.factors is not None:
            with np.errstate(over="ignore"):  # Inf as in torch; the merge then counts what is not finite
                masks.point("factors", np.asarray(found[before.factors]).astype(np.float32))
        if isinstance(before, Drop) and before.divide:
            masks.point("shares", np.array(before.shares, np.float32))
        if after is not None:
            masks.point("agree", np.array(after.strict, np.float32))
        record = masks.record
        record["vote"], record["mean"] = vote is not None, vote is not None and vote.mean
        record["zero"] = 1.0 if vote is None or vote.signs not in found else sign_of_zero(vote.zero, found[vote.signs])
        record["divisor"], record["scale"] = total.divisor, total.scale
        record["k"], record["after"] = (after.k, after.scale) if after else (0, 1.0)
        return masks

    def merge(self, stored: Stored, out_dtype: str, offset: int = 0) -> tuple[np.ndarray, int]:
        """The next block: (bits of the result, how many inputs and results are NaN or Inf).

        offset  the flat position of its first entry
        """
        combine, total = self._program.combine, self._sum
        if isinstance(combine, Mix):
            total = total if stored.base is not None else replace(total, deltas=False)
            return weighted_sum(total, stored.ends if combine.ends else stored, out_dtype)
        if not self._program.masks:
            return weighted_sum(total, stored, out_dtype)
        out = empty(stored, out_dtype)
        return out, self._run(stored, offset, out.ctypes.data, READ[out_dtype])

    def count_signs(self, stored: Stored, offset: int) -> int:
        """Add up the elected signs of the next block, merging nothing; returns how many inputs are NaN or Inf."""
        return self._run(stored, offset, 0, F32)

    @property
    def signs(self) -> np.int64:
        """The sum of the elected signs so far."""
        return np.int64(self._masks._kept["signs"][0])

    def _run(self, stored: Stored, offset: int, out: int, kind: int) -> int:
        record = self._masks.record
        record["out"], record["out_kind"] = out, kind
        return kernel("masked_merge")(self._masks.block(stored, offset, len(stored.experts) + 4))
