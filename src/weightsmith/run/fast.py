"""Tasks that the kernels of `ops.fused` can do: which they are, their stored rows, their measuring passes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from weightsmith.kernel import TrimmedVote
from weightsmith.keys import Key
from weightsmith.method import Pipeline, Scope
from weightsmith.ops import fused
from weightsmith.ops.fused import Stored
from weightsmith.run.context import Context, share
from weightsmith.run.kept import keeps_rows
from weightsmith.run.task import Task, blocks, row_step
from weightsmith.site import Summary

__all__ = ["counted", "cuts", "fits_kernels", "is_fused", "stored_rows", "tensor_vote"]


def is_fused(task: Task, context: Context) -> bool:
    """Whether the kernels do this task."""
    return fits_kernels(task, context) and fused.available()


def fits_kernels(task: Task, context: Context) -> bool:
    """Whether the kernels may do this task: they know the method, and all is stored in dtypes they read, on the CPU."""
    pipeline = task.pipeline
    if pipeline is None or len(pipeline.stages) != 1 or context.device != "cpu" or context.nonfinite == "allow":
        return False
    spec = pipeline.method.fused(len(context.inputs.experts))
    if spec is None or task.key.dtype not in fused.WRITTEN:
        return False
    wants_base = isinstance(spec, TrimmedVote) or spec.deltas
    read = context.inputs.models if wants_base else tuple(context.inputs.experts.items())
    return all(s.key(task.key.name).dtype in fused.READ and not s.computes(task.key.name) for _, s in read)


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


def tensor_vote(task: Task, pipeline: Pipeline, context: Context) -> TrimmedVote | None:
    """The trimmed vote whose cuts the kernels find over this tensor alone."""
    if pipeline.stages[0].scope is not Scope.TENSOR or not is_fused(task, context):
        return None
    spec = pipeline.method.fused(len(context.inputs.experts))
    return spec if isinstance(spec, TrimmedVote) else None


def cuts(task: Task, vote: TrimmedVote, context: Context) -> Summary:
    """What the measuring rounds would find, in fewer passes."""
    ranges = list(blocks(task.key, task.start, task.stop, context.measured))
    read = partial(stored_rows, task.key, context)
    if keeps_rows(task.key, len(context.inputs.models)):
        for block in ranges:
            read(*block)  # so that the sample is taken from memory
    summary = fused.tensor_cuts(vote, (task.key.rows, task.key.row_numel), read, ranges) if vote.trim else {}
    if "signs" in vote.steps:
        summary["ties.signs"] = fused.Vote(vote, summary).count_signs(read(*block) for block in ranges)
    context.progress(task.nbytes * len(vote.steps))
    return summary


def counted(task: Task, pipeline: Pipeline, round: int, context: Context, summary: Summary) -> dict[str, Any]:
    """A pass of a model-wide trimmed vote by the kernels: integer counts."""
    spec = pipeline.method.fused(len(context.inputs.experts))
    assert isinstance(spec, TrimmedVote)

    def read() -> Iterator[Stored]:
        for start, stop in blocks(task.key, task.start, task.stop, context.measured):
            yield stored_rows(task.key, context, start, stop)
            context.progress(share(task, start, stop))

    return fused.Counts(spec, spec.steps[round], summary).over(read())
