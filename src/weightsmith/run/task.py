"""The unit of work: one tensor (or a part of its rows, or a group of tensors) with its method.  Picklable, no data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightsmith.keys import Key
from weightsmith.method import Grain, Pipeline, Scope

__all__ = ["BLOCK", "PART_BYTES", "Task", "blocks", "cuttable", "parts", "task_peak"]

BLOCK = 1 << 18
"""Elements per block: a few float32 copies of it stay inside a core's cache.

Measuring passes always use blocks of this size, so that what they add up does not depend on settings."""

PART_BYTES = 32 << 20
"""Output bytes per part: the unit of checksums and, for tensors that may be cut, of work.  Fixed likewise."""


@dataclass(frozen=True)
class Task:
    """One piece of a plan.

    id         unique, stable between runs
    keys       output tensors with output dtypes: one, or all members of a group
    pipeline   what to do; None: copy from `source`
    source     whose tensor is copied: '' (the base) or an expert's name
    start/stop rows covered (whole tensors for groups)
    depth      see Site
    inputs     stored dtype per input, the base first if there is one
    stats      statistics that the pipeline reads
    reason     why this treatment, in words, for the plan's table
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
    peak: int = 0
    group: str = ""

    @property
    def key(self) -> Key:
        return self.keys[0]

    @property
    def nbytes(self) -> int:
        """Output bytes."""
        if len(self.keys) > 1:
            return sum(k.nbytes for k in self.keys)
        return self.key.nbytes * (self.stop - self.start) // max(self.key.rows, 1)


def blocks(key: Key, start: int, stop: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Row ranges of about `size` elements that cover start..stop; a row is never cut."""
    step = max(1, size // max(key.row_numel, 1))
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def parts(key: Key) -> list[tuple[int, int]]:
    """Row ranges of about PART_BYTES of output: the units that checksums are kept for."""
    if key.numel == 0:
        return [(0, key.rows)]
    row = max(key.nbytes // max(key.rows, 1), 1)
    step = max(1, PART_BYTES // row)
    return [(low, min(low + step, key.rows)) for low in range(0, key.rows, step)]


def cuttable(pipeline: Pipeline | None) -> bool:
    """Whether parts of a tensor may be separate tasks: no stage needs the whole tensor or a summary of it."""
    if pipeline is None:
        return True
    return pipeline.grain is Grain.ELEMENT and all(s.rounds == 0 or s.scope is Scope.MODEL for s in pipeline.stages)


def task_peak(key: Key, rows: int, count: int, has_base: bool, pipeline: Pipeline | None, block: int = BLOCK) -> int:
    """Predicted peak bytes of working on `rows` rows: inputs, the float stack, the method's scratch, the result."""
    if pipeline is None:
        return 2 * min(rows * key.row_numel, max(block, key.row_numel)) * 8
    numel = rows * key.row_numel
    if pipeline.grain is Grain.ELEMENT:
        numel = min(numel, max(block, key.row_numel))
    width = 8 if key.dtype == "float64" else 4
    stack = numel * width * (count + (1 if has_base else 0))
    return int(stack * (1.0 + pipeline.scratch) + 2 * numel * width)
