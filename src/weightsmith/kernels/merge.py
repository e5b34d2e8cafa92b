"""Merges straight over the stored bytes, in float32 arithmetic, as a `Program` says.

The torch path in `methods/` is the meaning; this gives the same bytes several times faster, without torch
being imported at all.  Where there is neither numba nor what it once compiled (`kernels.native`), `available()` is
False and the engine takes the torch path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from weightsmith.core.kernel import Program, WeightedSum, Window, sign_of_zero
from weightsmith.kernels import native
from weightsmith.kernels.job import Job, Results
from weightsmith.kernels.record import F32
from weightsmith.kernels.stored import READ, Stored, base_address, empty, input_addresses, kernel, scratch

__all__ = ["TOGETHER", "Merge", "available", "merged", "weighted_sum"]

TOGETHER = 8
"""Merges of the same block that are made from one decoding of it, and how many results lie side by side at most."""


def available() -> bool:
    """Whether the kernels can be used in this process."""
    return native.kernels() is not None


def weighted_sum(
    spec: WeightedSum, stored: Stored, out_dtype: str, out: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Carry out a weighted sum; `stored.base` is needed where `spec.deltas`.

    out  room for the result, contiguous

    Returns (bits of the result in `out_dtype`, how many of them are NaN or Inf).
    """
    # Bits, not numbers: bf16 has no numpy dtype.
    out = empty(stored, out_dtype) if out is None else out
    weights = np.array(spec.weights, np.float32)
    bad = kernel("weighted_sum")(
        *input_addresses(stored, weights), *base_address(stored if spec.deltas else None),
        spec.divisor, spec.scale, spec.deltas, out.ctypes.data, READ[out_dtype], out.size, scratch(3),
    )  # fmt: skip
    return out, bad


def _weighted_sums(specs: Sequence[WeightedSum], stored: Stored, out_dtype: str, outs: Sequence[np.ndarray]) -> int:
    """Carry out several sums, all of task vectors or all of inputs, into `outs`; how many results are NaN or Inf."""
    # Read by address: they have to live until the kernel is done.
    weights = np.array([spec.weights for spec in specs], np.float32)
    ends = np.array([(spec.divisor, spec.scale) for spec in specs], np.float32)
    places = np.array([out.ctypes.data for out in outs], np.int64)
    inputs, kinds, _, _ = input_addresses(stored, weights)
    count, deltas = len(stored.experts), specs[0].deltas
    return kernel("weighted_sums")(
        inputs, kinds, count, *base_address(stored if deltas else None), deltas, weights.ctypes.data, ends.ctypes.data,
        places.ctypes.data, len(specs), READ[out_dtype], stored.size, scratch(2 + count),
    )  # fmt: skip


def merged(
    merges: Sequence[Merge], stored: Stored, out_dtype: str, offset: int, rooms: Sequence[np.ndarray | None]
) -> list[tuple[np.ndarray, int]]:
    """The same block of several merges, as `Merge.merge` gives it; weighted sums share what is decoded.

    rooms  where results may go, contiguous; None: in an array of their own
    """
    alike: dict[tuple[bool, bool], list[int]] = {}
    for i, merge in enumerate(merges):
        if (found := merge.sum_of(stored)) is not None:
            alike.setdefault((found[0].deltas, found[1] is stored), []).append(i)
    # Where a sum has something that is not finite, all of its group are made again, one by one.
    made: dict[int, tuple[np.ndarray, int]] = {}
    for group in alike.values():
        sums = [found for i in group if (found := merges[i].sum_of(stored)) is not None]
        outs = [empty(stored, out_dtype) if (room := rooms[i]) is None else room for i in group]
        # A lone one needs room for one input at a time; of what is not finite each says how much by itself.
        if len(group) > 1 and not _weighted_sums([spec for spec, _ in sums], sums[0][1], out_dtype, outs):
            made |= {i: (out, 0) for i, out in zip(group, outs, strict=True)}
    return [
        made[i] if i in made else merge.merge(stored, out_dtype, offset, rooms[i]) for i, merge in enumerate(merges)
    ]


class Merge:
    """A program over one tensor, block by block in row order.

    found  results of the passes that the program names, by stage: cuts, factors, signs, shares
    noise  of its filters, see `Job`
    bare   the result is the merged task vector, without the base
    """

    def __init__(
        self, program: Program, found: Results, noise: Sequence[np.ndarray | None] = (), bare: bool = False
    ) -> None:
        self._program, self._bare = program, bare
        combine, own = program.combine, found.get(len(program.before), {})
        self._sum = combine.total(own)
        if combine.factor is not None:
            self._sum = replace(self._sum, scale=float(own[combine.factor]))
        if program.masks or bare:
            self._job = self._described(program, found, noise)

    def _described(self, program: Program, found: Results, noise: Sequence[np.ndarray | None]) -> Job:
        """The record, but for the block's own fields."""
        combine, after, total = program.combine, program.after, self._sum
        # The trim of TIES is one more filter, the last one: its cut is found among the method's own results.
        trims = (Window(combine.cut),) if combine.cut is not None else ()
        job = Job((*program.before, *trims), len(total.weights), found, noise)
        job.point("weights", np.array(total.weights, np.float32))
        job.point("signs", np.zeros(1, np.int64))
        if after is not None:
            job.point("agree", np.array(after.strict, np.float32))
        record, own = job.record, found.get(len(program.before), {})
        record["vote"], record["mean"] = combine.votes, combine.mean
        # While the signs are being counted there is no sum yet; a tie does not count then.
        record["zero"] = sign_of_zero(combine.zero, own[combine.signs]) if combine.signs in own else 1.0
        record["divisor"], record["scale"] = total.divisor, total.scale
        record["bare"] = self._bare
        last = found.get(len(program.before) + 1, {})
        record["k"], record["after"] = (after.k, after.total(last)) if after else (0, 1.0)
        return job

    def sum_of(self, stored: Stored) -> tuple[WeightedSum, Stored] | None:
        """The weighted sum that a block is, and of what; None where task vectors go through filters."""
        combine, total = self._program.combine, self._sum
        if combine.shares is not None:
            # Without a base the experts themselves are mixed.
            total = total if stored.base is not None else replace(total, deltas=False)
            return total, stored.ends if combine.ends else stored
        return None if self._program.masks or self._bare else (total, stored)

    def merge(
        self, stored: Stored, out_dtype: str, offset: int = 0, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, int]:
        """The next block: (bits of the result, how many inputs and results are NaN or Inf).

        offset  the flat position of its first entry
        out     room for the result, contiguous
        """
        if (found := self.sum_of(stored)) is not None:
            return weighted_sum(*found, out_dtype, out)
        out = empty(stored, out_dtype) if out is None else out
        return out, self._run(stored, offset, out.ctypes.data, READ[out_dtype])

    def count_signs(self, stored: Stored, offset: int) -> int:
        """Add up the elected signs of the next block, merging nothing; returns how many inputs are NaN or Inf."""
        return self._run(stored, offset, 0, F32)

    @property
    def signs(self) -> np.int64:
        """The sum of the elected signs so far."""
        return np.int64(self._job.kept("signs")[0])

    def _run(self, stored: Stored, offset: int, out: int, kind: int) -> int:
        record = self._job.record
        record["out"], record["out_kind"] = out, kind
        return kernel("masked_merge")(self._job.block(stored, offset, len(stored.experts) + 4))
