"""Carrying out a plan: checks before the first write, measuring passes, then every task."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.errors import PlanError
from weightsmith.io.sink import Sink
from weightsmith.method import Pipeline, Rows, Scope
from weightsmith.run.context import Context, Summaries
from weightsmith.run.execute import execute, fold, measure
from weightsmith.run.fast import is_fused
from weightsmith.run.inputs import Inputs
from weightsmith.run.plan import Plan
from weightsmith.run.runner import Runner, SerialRunner, ThreadRunner, one_thread_each
from weightsmith.run.task import BLOCK, Task, blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["carry_out", "choose_device", "context_of", "summarise"]


def carry_out(
    plan: Plan,
    inputs: Inputs,
    sink: Sink,
    *,
    device: str = "auto",
    block: int = BLOCK,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run every task of a plan into a sink; return task id -> record.

    The bytes written are the same for every block size, thread count and runner.
    On an error the sink is told to abort and keeps what can be resumed.
    """
    refuse_unequal(plan.tasks, inputs)
    context = replace(context_of(plan, inputs), device=choose_device(device), block=block)
    if not all(task.pipeline is None or is_fused(task, context) for task in plan.tasks):
        importlib.import_module("torch")  # once, before threads race for it; the fused path does without
    workers = runner or (ThreadRunner(plan.threads) if plan.threads > 1 else SerialRunner())
    meter = _Meter(plan, progress)
    context = replace(context, progress=meter.add)
    try:
        with one_thread_each():
            sink.begin(plan.keys)
            records = dict(sink.completed())
            todo = [task for task in plan.tasks if task.id not in records]
            meter.skip(sum(task.nbytes for task in plan.tasks if task.id in records))
            # What was measured belongs to all tensors, so it is measured again on resume.
            measured = summarise(plan.tasks, context, workers) if todo else {}
            context = replace(context, summaries=measured)
            for task, record in zip(todo, workers.map(partial(_one, context=context, sink=sink), todo), strict=True):
                records[task.id] = record
            inputs.fingerprints()  # refuses inputs that were changed meanwhile: the result would be a mixture
    except BaseException:
        sink.abort()
        raise
    meter.close()
    return {task.id: records[task.id] for task in plan.tasks}


def _one(task: Task, context: Context, sink: Sink) -> dict[str, Any]:
    record = execute(task, context, sink)
    sink.done(task.id, record)
    return record


def context_of(plan: Plan, inputs: Inputs) -> Context:
    """The parts of a context that follow from the plan."""
    return Context(inputs=inputs, seed=plan.recipe.seed, nonfinite=plan.recipe.nonfinite)


def summarise(tasks: Iterable[Task], context: Context, runner: Runner) -> Mapping[Pipeline, Summaries]:
    """Run the measuring passes of model-wide stages.

    Tensors whose pipelines have the same model-wide stages are measured together even if parameters differ between
    them (a ramp over depth, say) or the stages around (vectors beside the matrices of a spectral method, say): "the
    largest 20% of all changes" means all of them.
    """
    families: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        stages = task.pipeline.stages if task.pipeline is not None else ()
        wide = tuple(type(s) if s.scope is Scope.MODEL and s.rounds else None for s in stages)
        if task.pipeline is not None and any(wide):
            families.setdefault((*wide, task.pipeline.steps), []).append(task)
    summaries: dict[Pipeline, dict[int, Mapping[str, Tensor]]] = {}
    for members in families.values():
        pipelines = list(dict.fromkeys(t.pipeline for t in members if t.pipeline is not None))
        for pipeline in pipelines:
            summaries[pipeline] = {}
        for step in pipelines[0].steps:
            index, round = step
            if pipelines[0].stages[index].scope is not Scope.MODEL:
                continue
            known = {p: dict(summaries[p]) for p in pipelines}
            observe = partial(_measure, step=step, context=context, known=known)
            total: dict[str, Tensor] = {}
            for found in runner.map(observe, members):
                if any(isinstance(value, Rows) for value in found.values()):
                    raise TypeError(f"{pipelines[0].name}: per-row values have no meaning over the whole model")
                total = fold([total, found])
            if not total:
                continue  # every tensor let this pass out
            for pipeline in pipelines:
                digest = pipeline.stages[index].digest(total, round, summaries[pipeline].get(index, {}))
                summaries[pipeline][index] = digest
    return summaries


def _measure(
    task: Task, step: tuple[int, int], context: Context, known: Mapping[Pipeline, Summaries]
) -> dict[str, Tensor | Rows]:
    assert task.pipeline is not None
    return measure(task, step, context, known[task.pipeline])


def refuse_unequal(tasks: Iterable[Task], inputs: Inputs) -> None:
    """Integer and bool tensors are copied only if every input holds the same; checked before anything is written."""
    problems = []
    for task in tasks:
        key = task.key
        if key.floating or task.pipeline is not None or "equal everywhere" not in task.reason:
            continue
        (first_name, first), *others = inputs.models
        for start, stop in blocks(key, task.start, task.stop):
            here = first.bits(key.name, start, stop)
            for name, source in others:
                if not np.array_equal(here, source.bits(key.name, start, stop)):
                    problems.append(
                        f"{key.name} ({key.dtype}) differs between {first_name} and {name} and cannot be averaged; "
                        f'to keep the one of {first_name} add it to "exclude"'
                    )
                    break
    if problems:
        raise PlanError(dict.fromkeys(problems))


def choose_device(device: str) -> str:
    """'auto' is the CPU, whose bytes are the same on every run; a GPU is used where it is named."""
    if device in ("auto", "cpu"):
        return "cpu"
    import torch

    from weightsmith.errors import WeightsmithError

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsmithError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return str(torch.device(device))


class _Meter:
    """Counts bytes of output and of measured rows, for a progress bar."""

    def __init__(self, plan: Plan, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = sum(t.nbytes * (1 + (len(t.pipeline.steps) if t.pipeline else 0)) for t in plan.tasks)

    def add(self, nbytes: int) -> None:
        # Threads may interleave here; a lost update only makes the bar lag.
        self._done += nbytes
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    def skip(self, nbytes: int) -> None:
        self.add(nbytes)

    def close(self) -> None:
        if self._progress:
            self._progress(self._total, self._total)
