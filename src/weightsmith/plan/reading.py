"""How many bytes of its inputs a task reads: once for the merge, and again where what was read has been let go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from weightsmith.core.keys import Key
from weightsmith.core.method import Grain, Pipeline, Scope, Stage
from weightsmith.core.task import Task, Way, block_size, keeps_rows, one_by_one, row_step
from weightsmith.inputs.opened import Inputs, product_ranks
from weightsmith.kernels.cuts import readings
from weightsmith.ops.select import Cut

__all__ = ["all_bytes_read", "bytes_read"]


def all_bytes_read(tasks: Iterable[Task], inputs: Inputs) -> int:
    """`bytes_read` of a plan's tasks, summed up; the parts of a tensor are looked at as one task."""
    total = 0
    for _, parts in groupby(tasks, lambda task: task.keys[0].name):
        first, *others = parts
        total += bytes_read(replace(first, stop=others[-1].stop) if others else first, inputs)
    return total


def bytes_read(task: Task, inputs: Inputs, beside: Sequence[Task] = ()) -> int:
    """Stored bytes of the models and statistics that one task reads, all passes together.

    A pass that a method leaves out after seeing the values counts as read.

    beside   tasks of a sweep's other variants over the same rows: what they have in common is read once
    """
    key = task.key
    if task.pipeline is None:
        once = [task.source, *(_models(inputs) if task.compared else ())]
        return sum(_rows(task, inputs, name) for name in once)
    if task.group:
        return sum(source.key(k.name).nbytes for k in task.keys for _, source in inputs.models)
    ranks = product_ranks(key, task.pipeline, inputs)
    base = _rows(task, inputs, "") if inputs.base is not None else 0
    experts = sum(_rows(task, inputs, name) for name in inputs.experts)
    if ranks:
        experts = 4 * sum(ranks) * (key.rows + key.row_numel)
    pipeline = task.pipeline
    if _held(task, len(inputs.models)):
        own: Callable[[int], float] = lambda stop: 0  # noqa: E731
    elif task.way is Way.KERNEL:
        others = [other.pipeline for other in beside if other.pipeline is not None]
        own = partial(_kernel_looks, [pipeline, *others], key, len(inputs.experts))
    else:
        own = partial(_own_looks, pipeline, key, len(inputs.experts))
    # A look over the whole model finds nothing left of what was read; what was measured on the tensor is kept.
    visits = 1 + sum(one.rounds for _, one in pipeline.passes(len(inputs.experts))
                     if one.scope is Scope.MODEL and one.applies(key))  # fmt: skip
    passes = visits + own(len(pipeline.stages))
    looks = visits + _own_looks(pipeline, key, len(inputs.experts), len(pipeline.stages))
    stats = _stat_bytes(task, inputs) * looks if task.stats else 0
    if one_by_one(pipeline) and not beside and base and not ranks:
        compared = pipeline.codec is not None  # what was stored with what there was, see `engine.lost`
        return round(base * passes + experts * (passes - 1 + pipeline.used[0].traits.streams + compared)) + stats
    return round((base + experts) * passes) + stats


def _held(task: Task, inputs: int) -> bool:
    """Whether what the first pass over a tensor reads is there for those that follow."""
    assert task.pipeline is not None
    if task.pipeline.grain is not Grain.ELEMENT or (task.way is Way.KERNEL and keeps_rows(task.key, inputs)):
        return True
    return row_step(task.key, block_size(inputs), [part.span for part in task.encoded]) >= task.stop - task.start


def _models(inputs: Inputs) -> list[str]:
    return [""] * (inputs.base is not None) + list(inputs.experts)


def _rows(task: Task, inputs: Inputs, name: str) -> int:
    """Stored bytes of the task's rows in one model; '' is the base."""
    source = inputs.experts[name] if name else inputs.base
    assert source is not None
    key = source.key(task.key.name)
    return key.nbytes * (task.stop - task.start) // max(key.rows, 1)


def _own_looks(pipeline: Pipeline, key: Key, count: int, stop: int) -> int:
    """Looks at this tensor alone, of the stages before `stop`."""
    own = [one for i, one in pipeline.passes(count) if i < stop and one.scope is Scope.TENSOR and one.applies(key)]
    return sum(one.rounds for one in own)


def _kernel_looks(pipelines: Sequence[Pipeline], key: Key, count: int, stop: int) -> float:
    """The same by the kernels, which find the cuts over a tensor in fewer passes, of all variants at once.

    The other looks are the first variant's.
    """
    looks: float = _own_looks(pipelines[0], key, count, stop)
    asked: dict[tuple[Stage, ...], list[Cut]] = {}
    for pipeline in pipelines:
        for i, one in pipeline.passes(count):
            if i < stop and isinstance(one, Cut) and one.scope is Scope.TENSOR and one.applies(key):
                asked.setdefault(pipeline.stages[:i], []).append(one)
    for before, cuts in asked.items():
        wanted = [cut.ranks(key.numel) for cut in cuts]
        ranks = [[rank for one in wanted for rank in one[i]] for i in range(count)]
        ordered = any(spec is not None and spec.cut is not None for spec in (stage.fused(count) for stage in before))
        own = pipelines[0].stages[: len(before)] == before and any(cut in cuts for _, cut in pipelines[0].passes(count))
        looks += readings(ranks, (key.rows, key.row_numel), ordered) - (cuts[0].rounds if own else 0)
    return looks


def _stat_bytes(task: Task, inputs: Inputs) -> int:
    """Of one reading of the statistics: the task's rows where they have the parameter's shape, else all."""
    total = 0
    for stat in task.stats:
        for name in inputs.experts:
            key = inputs.stats[stat][name].key(task.key.name)
            own = key.shape == task.key.shape
            total += key.nbytes * (task.stop - task.start) // max(key.rows, 1) if own else key.nbytes
    return total
