"""Carrying out tasks: read rows, merge in float32, check, cast, hand over the bytes.

Work is written as generators that pause after every block: several tasks over the same tensor, the variants of a
sweep, then go on side by side, and what one of them has read and decoded serves all.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from weightsmith.core.errors import NumericError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Grain, Pipeline, Rows, Scope
from weightsmith.core.site import Group, Site, Summary
from weightsmith.core.task import Task, Way, blocks
from weightsmith.engine.context import Context, Summaries, share
from weightsmith.engine.fast import (
    Observer,
    counts_cells,
    cut_rounds,
    cuts,
    merger,
    observer,
    program,
    stored_rows,
    tallies,
)
from weightsmith.engine.hashes import Hashes
from weightsmith.engine.kept import Kept
from weightsmith.engine.lost import squares_lost
from weightsmith.engine.numeric import cast, encode, refuse_bad, refuse_bad_result, to_float
from weightsmith.engine.sites import site_of
from weightsmith.io.read.source import bits_to_tensor, holds_nonfinite
from weightsmith.io.write.sink import Sink
from weightsmith.ops import fused

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Context",
    "Steps",
    "Summaries",
    "execute",
    "fold",
    "measure",
    "measuring",
    "together",
    "working",
]

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that pauses after every block; what it returns is its result."""
Made = Generator[tuple[str, int, np.ndarray] | None, None, None]
"""Finished rows (tensor, first row, bits); None is a mere pause, in a measuring pass."""


def execute(task: Task, context: Context, sink: Sink) -> dict[str, Any]:
    """Do one task and return its record: the checksum of every part, and what overflowed in the cast."""
    return together([working(task, replace(context, kept=Kept()), sink)])[0]


def carried_out_here(task: Task) -> Task:
    """The task in torch where the kernels were planned but this process (a worker of a cluster, say) has none."""
    return replace(task, way=Way.ROWS) if task.way is Way.KERNEL and not fused.available() else task


def together(running: Sequence[Steps[T]]) -> list[T]:
    """Let generators take turns, step by step, until all have ended; returns their results in order."""
    results: dict[int, T] = {}
    left = dict(enumerate(running))
    while left:
        for i in list(left):
            try:
                next(left[i])
            except StopIteration as end:
                results[i] = end.value
                del left[i]
    return [results[i] for i in range(len(running))]


def working(task: Task, context: Context, sink: Sink) -> Steps[dict[str, Any]]:
    """`execute` as steps, which read through `context.kept`."""
    task = carried_out_here(task)
    hashes, said, told = Hashes(task), dict[str, Any](), dict[str, float]()
    if task.pipeline is None:
        produced: Made = _copied(task, context)
    elif task.way is Way.GROUP:
        produced = _grouped(task, task.pipeline, context)
    elif task.way is Way.CODEC:
        produced = _encoded(task, task.pipeline, context, said)
    elif task.way is Way.KERNEL:
        produced = _fused(task, task.pipeline, context)
    else:
        produced = _merged(task, task.pipeline, context, told)
    for made in produced:
        if made is not None:
            name, start, bits = made
            sink.write(name, start, bits)
            hashes.add(name, start, bits)
            context.progress(bits.nbytes)
            del made, bits  # while others have their turn, whole tensors would add up
        yield
    return {"parts": hashes.records(), **_noted(task, context, told), **said}


def _noted(task: Task, context: Context, told: dict[str, float]) -> dict[str, Any]:
    """What the stages want a later run to know, and what this one is to say: {'notes': {stage: notes}, 'told': ...}."""
    if task.pipeline is None:
        return {}
    summaries = context.summaries.get(task.pipeline, {})
    found = {s.name: note for i, s in enumerate(task.pipeline.stages) if (note := s.notes(summaries.get(i, {})))}
    for summary in summaries.values():
        told |= summary.get("told", {})
    return {kind: what for kind, what in (("notes", found), ("told", told)) if what}


# --- the ways a tensor is made -------------------------------------------------------------------


def _copied(task: Task, context: Context) -> Made:
    """The stored bytes of one input, cast only where the output dtype differs."""
    source = context.inputs.experts[task.source] if task.source else context.inputs.base
    assert source is not None
    stored, (out,) = source.key(task.key.name), task.keys
    for start, stop in blocks(task.key, task.start, task.stop, context.merged):
        if stored.dtype == out.dtype and not source.computes(stored.name):
            bits = context.kept.rows(source, (stored.name, start, stop))
            if stored.floating and holds_nonfinite(bits, stored.dtype):
                refuse_bad(to_float(bits_to_tensor(bits, stored.dtype)), stored, task.source or "base", start, context)
            yield out.name, start, bits
        else:
            value = source.read(stored.name, start, stop)
            if stored.floating:
                refuse_bad(to_float(value), stored, task.source or "base", start, context)
            yield out.name, start, encode(value, out, start)


def _fused(task: Task, pipeline: Pipeline, context: Context) -> Made:
    """The kernels, straight over the stored bits; the same bytes as `_merged`, several times faster."""
    summaries = yield from _local(task, pipeline, context, context.summaries.get(pipeline, {}), len(pipeline.stages))
    merging, found = merger(task, context, summaries), program(task, context)
    assert found is not None
    for start, stop in blocks(task.key, task.start, task.stop, context.merged):
        stored = stored_rows(task.key, context, start, stop)
        if not found.wants_base:
            _refuse_bad_base(task.key, stored.base, start, stop, context)
        out, bad = merging.merge(stored, task.key.dtype, start * task.key.row_numel)
        if bad:
            # The kernels only count; now it is worth asking whose it is, and to let torch say what is wrong.
            _refuse_bad_inputs(task.key, start, stop, context)
            list(_merged(replace(task, way=Way.ROWS), pipeline, replace(context, kept=Kept()), {}))
            refuse_bad_result(task.key, start, to_float(bits_to_tensor(out, task.key.dtype)), context)
        yield task.key.name, start, out


def _merged(task: Task, pipeline: Pipeline, context: Context, told: dict[str, float]) -> Made:
    """The torch path: blocks of rows, or the whole tensor where the method needs it."""
    summaries = yield from _local(task, pipeline, context, context.summaries.get(pipeline, {}), len(pipeline.stages))
    for start, stop in _ranges(task, pipeline, context.merged):
        site = replace(site_of(task.key, task, context, start, stop), told=told)
        # No name for the merged tensor: it would live on while others have their turn.
        yield from _finished(pipeline.merge(site, summaries), task.key, site, start, context)


def _encoded(task: Task, pipeline: Pipeline, context: Context, said: dict[str, Any]) -> Made:
    """The parts that a codec makes of a tensor; every block gives the rows that stand for it.

    What codecs of whole tensors lose is noted in `said`; the others work at the speed of copying.
    """
    codec = pipeline.codec
    assert codec is not None
    summaries = yield from _local(task, pipeline, context, context.summaries.get(pipeline, {}), len(pipeline.stages))
    for start, stop in _ranges(task, pipeline, context.merged):
        site = site_of(task.key, task, context, start, stop)
        made = pipeline.encode(site, summaries)
        stored: dict[str, Tensor] = {}
        for part in task.encoded:
            low, high = part.rows(site.offset, site.offset + site.stack[0].numel())
            rows = made[part.key.name]
            wanted = (high - low, *part.key.shape[1:]) if part.key.shape else ()
            if tuple(rows.shape) != wanted:
                raise NumericError(f"{part.key.name}: the codec returned shape {list(rows.shape)} for {list(wanted)}")
            if part.key.floating:
                refuse_bad_result(part.key, low, rows, context)
            stored[part.key.name] = cast(rows, part.key, low)
            del rows, made[part.key.name]
        if codec.grain is Grain.TENSOR:
            said["lost"] = squares_lost(task, codec, site, stored)
        for part in task.encoded:
            low, _ = part.rows(site.offset, site.offset + site.stack[0].numel())
            yield from _out(stored.pop(part.key.name), part.key, low, context)


def _grouped(task: Task, pipeline: Pipeline, context: Context) -> Made:
    sites = {key.name: site_of(key, task, context, 0, key.rows) for key in task.keys}
    merged = pipeline.method.merge_group(Group(task.group, sites))
    for key in task.keys:
        yield from _finished(merged[key.name], key, sites[key.name], 0, context)


def _finished(out: Tensor, key: Key, site: Site, start: int, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    if tuple(out.shape) != site.block_shape:
        raise NumericError(f"{key.name}: the method returned shape {list(out.shape)} for {list(site.block_shape)}")
    refuse_bad_result(key, start, out, context)
    return _out(cast(out, key, start), key, start, context)


def _out(made: Tensor, key: Key, start: int, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """Rows from `start` on, as they come back from where they were made."""
    return map(partial(_placed, key.name, start), context.place.fetch(made))


def _placed(name: str, start: int, piece: tuple[int, np.ndarray]) -> tuple[str, int, np.ndarray]:
    return name, start + piece[0], piece[1]


# --- measuring -----------------------------------------------------------------------------------


def measure(task: Task, step: tuple[int, int], context: Context, summaries: Summaries) -> dict[str, Tensor | Rows]:
    """One measuring pass over one task's rows, for a model-wide stage.  Blocks have their fixed size."""
    return together([measuring(task, step, replace(context, kept=Kept()), summaries)])[0]


def measuring(
    task: Task, step: tuple[int, int], context: Context, summaries: Summaries
) -> Steps[dict[str, Tensor | Rows]]:
    """`measure` as steps, which read through `context.kept`."""
    task = carried_out_here(task)
    assert task.pipeline is not None
    index, round = step
    if task.pipeline.stages[index].skips(task.key, round, summaries.get(index, {})):
        return {}
    local = yield from _local(task, task.pipeline, context, summaries, index)
    return (yield from _measured(task, task.pipeline, step, context, local))


class _Totals:
    """What measuring finds, added up as it comes: a histogram per block of a large tensor would be a gigabyte."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._joined: dict[str, _Joined] = {}

    def add(self, part: Mapping[str, Any], into: bool = False) -> None:
        """`into`: counts are added to where the first ones lie, which are nobody else's."""
        for name, value in part.items():
            if isinstance(value, Rows):
                self._joined.setdefault(name, _Joined()).add(value.values)
            elif name not in self._sums:
                self._sums[name] = value
            elif into and isinstance(value, torch.Tensor) and value.dtype == torch.int64:
                self._sums[name] += value
            else:
                self._sums[name] = _sum(self._sums[name], value)

    def result(self) -> dict[str, Any]:
        """Sums, and as `Rows` what was joined."""
        return {**self._sums, **{name: Rows(values.result()) for name, values in self._joined.items()}}


class _Joined:
    """Tensors (or arrays), joined on their last axis as they come, in a buffer that doubles when it is full.

    Kept one by one they would lie between the large blocks that are freed around them: the holes in the heap of a
    tensor of 4096 blocks were a gigabyte.
    """

    def __init__(self) -> None:
        self._buffer: Any = None
        self._filled = 0

    def add(self, values: Any) -> None:
        end = self._filled + values.shape[-1]
        if self._buffer is None:
            self._buffer, self._filled = values, end
            return
        if end > self._buffer.shape[-1]:
            shape, old = (*self._buffer.shape[:-1], 2 * end), self._buffer
            self._buffer = np.empty(shape, old.dtype) if isinstance(old, np.ndarray) else old.new_empty(shape)
            self._buffer[..., : self._filled] = old[..., : self._filled]
        plain = isinstance(self._buffer, np.ndarray)
        self._buffer[..., self._filled : end] = np.asarray(values) if plain else torch.as_tensor(values)
        self._filled = end

    def result(self) -> Any:
        whole = self._buffer[..., : self._filled]
        return np.ascontiguousarray(whole) if isinstance(whole, np.ndarray) else whole.contiguous()


def fold(totals: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add equal names up in the order given; `Rows` are joined on their last axis.  Values: tensors or arrays."""
    sums = _Totals()
    for total in totals:
        sums.add(total)
    return {name: value.values if isinstance(value, Rows) else value for name, value in sums.result().items()}


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, (np.ndarray, np.generic)) != isinstance(b, (np.ndarray, np.generic)):
        return np.asarray(a) + np.asarray(b)  # one tensor went through the kernels, the other did not
    return a + b


def _local(task: Task, pipeline: Pipeline, context: Context, known: Summaries, stop: int) -> Steps[dict[int, Summary]]:
    """The summaries of the stages before `stop` that are taken over this tensor alone."""
    summaries: dict[int, Summary] = dict(known)
    ranked = cut_rounds(task, pipeline, context) if stop else 0
    if ranked:
        question = pipeline.stages[0].question(0), pipeline.stages[0].question(ranked - 1)
        place = id(context.inputs), task.key, task.start, task.stop, "cuts"
        summaries[0], _ = yield from context.kept.once((question, place), partial(cuts, task, pipeline, context))
        context.progress(task.nbytes * ranked)
    for index, stage in enumerate(pipeline.stages[:stop]):
        if stage.scope is not Scope.TENSOR:
            continue
        for round in range(0 if index else ranked, stage.rounds):
            if stage.skips(task.key, round, summaries.get(index, {})):
                continue
            found = yield from _measured(task, pipeline, (index, round), context, summaries)
            summaries[index] = stage.digest(fold([found]), round, summaries.get(index, {}))
    return summaries


def _measured(
    task: Task, pipeline: Pipeline, step: tuple[int, int], context: Context, summaries: Summaries
) -> Steps[dict[str, Tensor | Rows]]:
    """One measuring pass; tasks side by side whose stages ask the same of the same blocks share it."""
    index, round = step
    stages = pipeline.stages
    work = partial(_measuring, task, pipeline, step, context, summaries)
    # What is known of the model may differ: other tensors may have been measured.
    wide = [i for i, s in enumerate(stages[: index + (round > 0)]) if s.scope is Scope.MODEL and s.rounds]
    found_out = ((i, n, value) for i in wide for n, value in summaries.get(i, {}).items() if n != "told")
    known = [(i, n, np.asarray(value).tobytes()) for i, n, value in found_out]
    question = stages[index].question(round), tuple(known)
    shared = id(context.inputs), context.seed, context.nonfinite, stages[:index], question
    found: dict[str, Tensor | Rows]
    found, done_now = yield from context.kept.once((shared, task.key, task.start, task.stop, task.depth), work)
    if not done_now:
        context.progress(task.nbytes)
    return found


def _measuring(
    task: Task, pipeline: Pipeline, step: tuple[int, int], context: Context, summaries: Summaries
) -> Steps[dict[str, Tensor | Rows]]:
    if task.way is Way.KERNEL and counts_cells(pipeline, step, context):
        return (yield from tallies(task, pipeline, step, context, summaries))
    if task.way is Way.KERNEL:
        return (yield from _observed(task, observer(task, pipeline, step, context, summaries), context))
    totals = _Totals()
    for start, stop in _ranges(task, pipeline, context.measured):
        site = site_of(task.key, task, context, start, stop)
        totals.add({n: _home(found) for n, found in pipeline.measure(step, site, summaries).items()}, into=True)
        context.progress(share(task, start, stop))
        yield
    return totals.result()


def _observed(task: Task, looking: Observer, context: Context) -> Steps[dict[str, Any]]:
    """The same by the kernels."""
    for start, stop in blocks(task.key, task.start, task.stop, context.measured):
        if looking.add(stored_rows(task.key, context, start, stop), start * task.key.row_numel):
            _refuse_bad_inputs(task.key, start, stop, context)
        context.progress(share(task, start, stop))
        yield
    return looking.result()


def _home(found: Any) -> Any:
    """What was measured, on the CPU: devices differ from task to task."""
    if isinstance(found, Rows):
        return Rows(_home(found.values))
    return found.cpu() if isinstance(found, torch.Tensor) else found


def _ranges(task: Task, pipeline: Pipeline, block: int) -> Iterable[tuple[int, int]]:
    if pipeline.grain is Grain.ELEMENT:
        return blocks(task.key, task.start, task.stop, block, [part.span for part in task.encoded])
    return [(task.start, task.stop)]


def _refuse_bad_base(key: Key, bits: np.ndarray | None, start: int, stop: int, context: Context) -> None:
    """Look at a base that no kernel reads: an input that is broken is so whether the method needs it or not."""
    base = context.inputs.base
    if base is not None and (bits is None or holds_nonfinite(bits, base.key(key.name).dtype)):
        refuse_bad(to_float(base.read(key.name, start, stop)), key, "base", start, context)


def _refuse_bad_inputs(key: Key, start: int, stop: int, context: Context) -> None:
    for name, source in context.inputs.models:
        refuse_bad(to_float(source.read(key.name, start, stop)), key, name, start, context)
