"""The unit of work: one tensor (or a part of its rows, or a group of tensors) with its method.  Picklable, no data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from weightsmith.core.keys import DTYPES, Key, Part
from weightsmith.core.method import BASE, Grain, Pipeline, Scope

__all__ = ["BLOCK", "PART_BYTES", "Task", "Way", "block_size", "blocks", "cuttable", "keeps_masks", "keeps_rows",
           "one_by_one", "parts", "row_step", "takes_deltas"]  # fmt: skip

BLOCK = 1 << 18
"""Elements per block: a few float32 copies of it stay inside a core's cache.

Measuring passes always use blocks of `block_size`, so that what they add up does not depend on settings."""

PART_BYTES = 32 << 20
"""Output bytes per part: the unit of checksums and, for tensors that may be cut, of work.  Fixed likewise."""


KEPT = 24 << 20
"""Entries of all inputs of a tensor up to which the kernels keep all its stored rows, not only the latest block's."""


MASKED = 1 << 27
"""Entries of all experts of a tensor up to which the kernels keep what random drops have left, a bit for each."""


class Way(Enum):
    """How a task is carried out: decided once, by the planner.

    No part of a run's identity: the bytes are those of ROWS or WHOLE whatever the machine has to offer.
    """

    COPY = "copy"  # the stored bytes of one input
    ROWS = "rows"  # torch, block by block
    WHOLE = "whole"  # torch, the whole tensor at once
    GROUP = "group"  # torch, several whole tensors at once
    CODEC = "codec"  # torch, into the parts of a compressed tensor
    KERNEL = "kernel"  # machine code over the stored bits, block by block


@dataclass(frozen=True)
class Task:
    """One piece of a plan.

    id         unique, stable between runs
    way        how it is carried out, see `Way`
    keys       output tensors with output dtypes: one, all members of a group, or the parts of an encoded tensor
    of         the input tensor, where the output has another name or form
    experts    names of the experts, where the output depends on them
    pipeline   what to do; None: copy from `source`
    source     whose tensor is copied: '' (the base) or an expert's name
    start/stop rows covered (whole tensors for groups)
    depth      see Site
    inputs     stored dtype per input, the base first if there is one
    stats      statistics that the pipeline reads
    reason     why this treatment, in words, for the plan's table
    compared   a copy that is right only if every input holds the same: integers, which have no mean
    """

    id: str
    keys: tuple[Key, ...]
    pipeline: Pipeline | None
    source: str = ""
    start: int = 0
    stop: int = 0
    depth: float | None = None
    stats: tuple[str, ...] = ()
    reason: str = ""
    compared: bool = False
    peak: int = 0
    group: str = ""
    of: Key | None = None
    experts: tuple[str, ...] = ()
    way: Way = Way.COPY

    @property
    def key(self) -> Key:
        """The tensor that is read, with the output's dtype; for a group its first."""
        return self.of or self.keys[0]

    @property
    def nbytes(self) -> int:
        """Output bytes."""
        whole = sum(k.nbytes for k in self.keys)
        return whole if self.group else whole * (self.stop - self.start) // max(self.key.rows, 1)

    @property
    def encoded(self) -> tuple[Part, ...]:
        """The parts that a codec makes of this tensor; none if the pipeline does not end in one."""
        codec = self.pipeline.codec if self.pipeline is not None else None
        return codec.parts(self.key, self.experts) if codec is not None else ()


def block_size(inputs: int) -> int:
    """Elements per block for a number of inputs, the base included: many experts take no more memory than three."""
    return max(min(BLOCK, 1 << 14), BLOCK * 4 // max(inputs, 4))


def row_step(key: Key, size: int, spans: Iterable[int] = ()) -> int:
    """How many rows make up about `size` elements, at least one; a multiple of every span in elements."""
    unit = math.lcm(*(span // math.gcd(span, max(key.row_numel, 1)) for span in spans))
    return max(1, size // max(key.row_numel, 1) // unit) * unit


def blocks(key: Key, start: int, stop: int, size: int = BLOCK, spans: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """Row ranges of about `size` elements that cover start..stop; a row (see also `row_step`) is never cut."""
    step = row_step(key, size, spans)
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def parts(key: Key, spans: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Row ranges of about PART_BYTES of output: the units that checksums are kept for."""
    if key.numel == 0:
        return [(0, key.rows)]
    step = row_step(key, PART_BYTES // DTYPES[key.dtype].itemsize, spans)
    return [(low, min(low + step, key.rows)) for low in range(0, key.rows, step)]


def cuttable(pipeline: Pipeline | None, count: int) -> bool:
    """Whether parts of a tensor may be separate tasks: no stage needs the whole tensor or a measure of it."""
    if pipeline is None:
        return True
    return pipeline.grain is Grain.ELEMENT and all(p.scope is Scope.MODEL for _, p in pipeline.passes(count))


def keeps_rows(key: Key, inputs: int) -> bool:
    """Whether the kernels keep all blocks of a tensor's stored rows: they are few, and often read several times."""
    return key.numel * inputs <= KEPT


def keeps_masks(key: Key, experts: int) -> bool:
    """Whether the kernels keep what random drops leave of all blocks of a tensor."""
    return key.numel * experts <= MASKED


def takes_deltas(pipeline: Pipeline | None) -> bool:
    """Whether all stages look at task vectors only, which then are made in place."""
    return pipeline is not None and all(BASE in stage.traits.needs for stage in pipeline.used)


def one_by_one(pipeline: Pipeline | None) -> bool:
    """Whether the only stage asks for one task vector at a time, so that their stack is never made."""
    return pipeline is not None and len(pipeline.used) == 1 and pipeline.used[0].traits.streams > 0
