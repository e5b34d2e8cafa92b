"""Tasks that the kernels of `ops.fused` can do: which they are, their stored rows, their measuring passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

from weightsmith.core.kernel import Drop, Mix, Program, TrimmedVote, Window
from weightsmith.core.keys import Key
from weightsmith.core.method import Pipeline, Scope
from weightsmith.core.site import Summary
from weightsmith.core.task import Task, Way, blocks, keeps_rows, row_step
from weightsmith.engine.context import Context, Summaries
from weightsmith.kernels.stored import Stored
from weightsmith.ops import fused
from weightsmith.ops.cuts import Cells, counted, tensor_cuts
from weightsmith.ops.noise import stream
from weightsmith.ops.select import ROUNDS

__all__ = [
    "Observer",
    "counts_cells",
    "cut_rounds",
    "cuts",
    "merger",
    "observer",
    "program",
    "stored_rows",
    "tallies",
]


class Observer(Protocol):
    """A measuring pass over one tensor."""

    def add(self, stored: Stored, offset: int) -> int:
        """Look at the next block, whose first entry has this flat position; how many inputs are NaN or Inf."""

    def result(self) -> dict[str, Any]:
        """What `Stage.measure` finds, summed up."""


def program(task: Task, context: Context) -> Program | None:
    """What the kernels would do for this task, if they know its methods."""
    return None if task.pipeline is None else task.pipeline.fused(len(context.inputs.experts))


def stored_rows(key: Key, context: Context, start: int, stop: int) -> Stored:
    """Rows start..stop of every expert and of the base, as stored; blocks of tensors that are not large are kept."""
    inputs, step = context.inputs, row_step(key, context.measured)
    whole = start - start % step
    kept = context.kept.stored.get((id(inputs), key.name, whole, min(whole + step, key.rows)))
    if kept is not None and stop <= whole + step:
        return kept[start - whole : stop - whole] if (start, stop) != (whole, whole + step) and key.shape else kept
    base = None if inputs.base is None or inputs.base.computes(key.name) else inputs.base
    found = Stored(
        experts=[source.bits(key.name, start, stop) for source in inputs.experts.values()],
        dtypes=[source.key(key.name).dtype for source in inputs.experts.values()],
        base=None if base is None else base.bits(key.name, start, stop),
        base_dtype="" if base is None else base.key(key.name).dtype,
    )
    if (start, stop) == (whole, min(whole + step, key.rows)):
        if not keeps_rows(key, len(inputs.models)):
            context.kept.stored.clear()  # the latest block only: the next variant of a sweep asks for it
        context.kept.stored[id(inputs), key.name, start, stop] = found
    return found


def merger(task: Task, context: Context, summaries: Summaries) -> fused.Merge:
    """What makes the task's rows, block by block."""
    found = program(task, context)
    assert found is not None
    return fused.Merge(found, _known(summaries), _streams(task, context, found))


def cut_rounds(task: Task, pipeline: Pipeline, context: Context) -> int:
    """How many rounds of the first stage `cuts` stands for: those that rank entries over this tensor alone."""
    stage = pipeline.stages[0]
    if stage.scope is not Scope.TENSOR or task.way is not Way.KERNEL:
        return 0
    spec = stage.fused(len(context.inputs.experts))
    return ROUNDS if isinstance(spec, Window) else stage.rounds if isinstance(spec, TrimmedVote) else 0


def cuts(task: Task, pipeline: Pipeline, context: Context) -> Generator[None, None, Summary]:
    """What these rounds would find, in fewer passes; pauses after every block."""
    key, count = task.key, len(context.inputs.experts)
    stage = pipeline.stages[0]
    spec = stage.fused(count)
    summary: dict[str, Any] = {}
    if isinstance(spec, (Window, TrimmedVote)) and spec.trim:
        wanted = stage.cuts(count, key.numel)
        summary = yield from context.kept.jointly(_asking(task, context, "cuts"), wanted, partial(_cut, task, context))
    if isinstance(spec, TrimmedVote) and "signs" in spec.steps:
        signs = fused.Merge(Program(spec), summary)
        for start, stop in blocks(key, task.start, task.stop, context.measured):
            signs.add(stored_rows(key, context, start, stop), start * key.row_numel)
            yield
        summary |= signs.result()
    return summary


def _cut(
    task: Task, context: Context, asked: Sequence[Sequence[Sequence[int]]]
) -> Generator[None, None, list[dict[str, Any]]]:
    """The cuts that several variants ask for, found together."""
    key, ranges = task.key, list(blocks(task.key, task.start, task.stop, context.measured))
    read = partial(stored_rows, key, context)
    if keeps_rows(key, len(context.inputs.models)):
        for block in ranges:
            read(*block)  # so that the sample is taken from memory
            yield
    ranks = [[rank for one in asked for rank in one[i]] for i in range(len(context.inputs.experts))]
    found = yield from tensor_cuts(ranks, (key.rows, key.row_numel), read, ranges)
    ends = list(accumulate((len(one[0]) for one in asked), initial=0))
    return [{name: value[:, a:b] for name, value in found.items()} for a, b in pairwise(ends)]


def counts_cells(pipeline: Pipeline, step: tuple[int, int], context: Context) -> bool:
    """Whether a measuring pass by the kernels counts magnitudes, see `tallies`."""
    index, round = step
    spec = pipeline.stages[index].fused(len(context.inputs.experts))
    return isinstance(spec, TrimmedVote) and spec.steps[round] in ("high", "low")


def tallies(
    task: Task, pipeline: Pipeline, step: tuple[int, int], context: Context, summaries: Summaries
) -> Generator[None, None, dict[str, Any]]:
    """What such a pass finds, for all variants at once; pauses after every block."""
    index, round = step
    count = len(context.inputs.experts)
    spec = pipeline.stages[index].fused(count)
    assert isinstance(spec, TrimmedVote)
    name = spec.steps[round]
    opened = [-1] * count if name == "high" else summaries[index]["select.bucket"][:, 0].tolist()
    found = yield from context.kept.jointly(_asking(task, context, name), opened, partial(_tally, task, context))
    context.progress(task.nbytes)
    return {f"select.{name}": found.high if name == "high" else found.low(opened)}


def _tally(task: Task, context: Context, asked: Sequence[Sequence[int]]) -> Generator[None, None, list[Cells]]:
    ranges = blocks(task.key, task.start, task.stop, context.measured)
    cells = yield from counted(list(zip(*asked, strict=True)), partial(stored_rows, task.key, context), ranges)
    return [cells] * len(asked)


def _asking(task: Task, context: Context, what: str) -> tuple[Any, ...]:
    return id(context.inputs), task.key, task.start, task.stop, what


def observer(task: Task, pipeline: Pipeline, step: tuple[int, int], context: Context, summaries: Summaries) -> Observer:
    """One measuring pass by the kernels, of those that are no `tallies`."""
    index, _ = step
    spec, count = pipeline.stages[index].fused(len(context.inputs.experts)), len(context.inputs.experts)
    if isinstance(spec, TrimmedVote):
        return merger(task, context, summaries)
    if isinstance(spec, Mix):
        return fused.Products(spec)
    found = program(task, context)
    assert found is not None
    assert isinstance(spec, (Drop, Window))
    return fused.Masses(spec, count, summaries.get(index, {}), _streams(task, context, found))


def _known(summaries: Summaries) -> Summary:
    """What the stages found: a program has at most one that ranks, one that rescales, one that votes."""
    return {name: value for summary in summaries.values() for name, value in summary.items()}


def _streams(task: Task, context: Context, found: Program) -> list[tuple[int, int]]:
    if not isinstance(found.before, Drop):
        return []
    return [stream(context.seed, task.key.name, expert, found.before.salt) for expert in context.inputs.experts]
