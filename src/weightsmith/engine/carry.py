"""Carrying out a plan: checks before the first write, measuring passes, then every task."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from weightsmith.core.errors import PlanError, WeightsmithError
from weightsmith.core.problem import Code, Problems, Tensors
from weightsmith.core.task import Task, Way, blocks
from weightsmith.devices.place import CPU, Place
from weightsmith.engine.context import Context
from weightsmith.engine.execute import Variant, execute
from weightsmith.engine.lanes import Lanes
from weightsmith.engine.model import Bundle, measure_models, side_by_side
from weightsmith.engine.runner import Runner, SerialRunner, ThreadRunner, one_thread_each
from weightsmith.inputs.opened import Inputs
from weightsmith.io.write.sink import Sink
from weightsmith.plan.fit import Fit
from weightsmith.plan.plan import Plan

__all__ = [
    "Job",
    "carry_out",
    "carry_out_all",
    "context_of",
    "refuse_unequal",
]


@dataclass(frozen=True)
class Job:
    """One output: what to do, from what, into what."""

    plan: Plan
    inputs: Inputs
    sink: Sink


def carry_out(
    plan: Plan,
    inputs: Inputs,
    sink: Sink,
    *,
    block: int | None = None,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run every task of a plan into a sink, on the devices that it was made for; return task id -> record.

    The bytes written are the same for every block size, thread count and runner.
    On an error the sink is told to abort and keeps what can be resumed.
    """
    job = Job(plan, inputs, sink)
    return carry_out_all([job], fit=plan.fit, block=block, runner=runner, progress=progress)[0]


def carry_out_all(
    jobs: Sequence[Job],
    *,
    threads: int | None = None,
    fit: Fit | None = None,
    block: int | None = None,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run several plans side by side, tensor by tensor; return task id -> record for each.

    Jobs that share their `Inputs` (the same object) read and decode every block once.  Each writes the bytes
    that it would write alone.  `threads`: default as the first plan says; `fit`: the devices to use.
    """
    refuse_unequal({(t.id, t.reason, id(job.inputs)): (t, job.inputs) for job in jobs for t in job.plan.tasks}.values())
    contexts = [replace(context_of(job.plan, job.inputs), block=block) for job in jobs]
    if fit is not None or not all(t.way in (Way.COPY, Way.KERNEL) for job in jobs for t in job.plan.tasks):
        importlib.import_module("torch")  # once, before threads race for it; the fused path does without
    count = threads or jobs[0].plan.threads
    workers = runner or (ThreadRunner(count) if count > 1 else SerialRunner())
    if fit is not None and workers.remote:
        raise WeightsmithError(
            f"--ray with --device {fit.accelerator.kind}: the workers of a cluster merge on their CPUs; leave one out"
        )
    lanes = None if fit is None else Lanes(fit)
    meter, marks = _Meter(jobs, progress), None
    if not workers.remote:
        contexts = [replace(context, progress=meter.add) for context in contexts]
    try:
        with one_thread_each():
            for job in jobs:
                job.sink.begin(job.plan.keys)
            records = [dict(job.sink.completed()) for job in jobs]
            todo = [
                [task for task in job.plan.tasks if task.id not in done]
                for job, done in zip(jobs, records, strict=True)
            ]
            meter.skip(sum(t.nbytes for job, d in zip(jobs, records, strict=True) for t in job.plan.tasks if t.id in d))
            marks = None if workers.remote else jobs[0].sink.aside()
            contexts = [replace(context, marks=marks) for context in contexts]
            # What was measured belongs to all tensors, so it is measured again on resume.
            tasks = [job.plan.tasks if left else () for job, left in zip(jobs, todo, strict=True)]
            measured = measure_models(tasks, contexts, workers, lanes)
            contexts = [replace(c, found=found) for c, found in zip(contexts, measured, strict=True)]
            bundles = side_by_side(todo)
            sinks = [job.sink.writer() if workers.remote else job.sink for job in jobs]
            work = partial(_execute, contexts=contexts, sinks=sinks, lanes=lanes)
            batches = _by_file(bundles, jobs) if workers.remote else [[bundle] for bundle in bundles]
            for batch, results in zip(batches, workers.map(work, batches), strict=True):
                for bundle, found in zip(batch, results, strict=True):
                    for (i, task), record in zip(bundle, found, strict=True):
                        records[i][task.id] = record
                        if workers.remote:
                            jobs[i].sink.done(task.id, record)
                            meter.add(task.nbytes)
            for inputs in {id(job.inputs): job.inputs for job in jobs}.values():
                inputs.fingerprints()  # refuses inputs that were changed meanwhile: the result would be a mixture
        meter.close()
    except BaseException:
        for job in jobs:
            job.sink.abort()
        raise
    finally:
        if marks is not None:
            marks.close()
        if lanes is not None:
            lanes.close()
    return [{task.id: done[task.id] for task in job.plan.tasks} for job, done in zip(jobs, records, strict=True)]


def _by_file(bundles: Sequence[Bundle], jobs: Sequence[Job]) -> list[list[Bundle]]:
    """Bundles that have to be worked on by one process, as their sinks say; in the order of the first of each."""
    batch_of: dict[tuple[int, str], list[Bundle]] = {}
    batches: list[list[Bundle]] = []
    for bundle in bundles:
        files = {(i, file) for i, task in bundle for file in jobs[i].sink.files_of(key.name for key in task.keys)}
        met = list({id(batch_of[file]): batch_of[file] for file in files if file in batch_of}.values())
        batch: list[Bundle] = met[0] if met else []
        if not met:
            batches.append(batch)
        for other in met[1:]:  # this bundle joins what was apart
            batch += other
            batches = [kept for kept in batches if kept is not other]
            batch_of = {file: batch if found is other else found for file, found in batch_of.items()}
        batch.append(bundle)
        batch_of |= dict.fromkeys(files, batch)
    return batches


def _execute(
    batch: Sequence[Bundle], contexts: Sequence[Context], sinks: Sequence[Sink], lanes: Lanes | None
) -> list[list[dict[str, Any]]]:
    return [_execute_one(bundle, contexts, sinks, lanes) for bundle in batch]


def _execute_one(
    bundle: Bundle, contexts: Sequence[Context], sinks: Sequence[Sink], lanes: Lanes | None
) -> list[dict[str, Any]]:
    def work(place: Place) -> list[dict[str, Any]]:
        return execute([Variant(task, replace(contexts[i], place=place), sinks[i]) for i, task in bundle])

    found = work(CPU) if lanes is None else lanes.do([task for _, task in bundle], work)
    for (i, task), record in zip(bundle, found, strict=True):
        sinks[i].done(task.id, record)
    return found


def context_of(plan: Plan, inputs: Inputs) -> Context:
    """The parts of a context that follow from the plan."""
    return Context(inputs=inputs, seed=plan.recipe.seed, nonfinite=plan.recipe.nonfinite)


def refuse_unequal(tasks: Iterable[tuple[Task, Inputs]]) -> None:
    """Integer and bool tensors are copied only if every input holds the same; checked before anything is written."""
    problems = Problems()
    for task, inputs in tasks:
        key = task.key
        if not task.compared:
            continue
        (first_name, first), *others = inputs.models
        for start, stop in blocks(key, task.start, task.stop):
            here = first.bits(key.name, start, stop)
            for name, source in others:
                if not np.array_equal(here, source.bits(key.name, start, stop)):
                    text = partial(_unequal, key.dtype, first_name, name)
                    problems.share(Code.UNEQUAL, key.name, (key.dtype, first_name, name), text)
                    break
    if problems:
        raise PlanError(problems)


def _unequal(dtype: str, first: str, other: str, tensors: Tensors) -> str:
    return (
        f"{tensors} ({dtype}) {tensors['differs|differ']} between {first} and {other} and cannot be averaged; "
        f'to keep {tensors["the one|those"]} of {first} add {tensors["it|them"]} to "exclude"'
    )


class _Meter:
    """Counts bytes of output and of measured rows, for a progress bar."""

    def __init__(self, jobs: Iterable[Job], progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = sum(t.nbytes * (1 + _looks(t, job.inputs)) for job in jobs for t in job.plan.tasks)

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


def _looks(task: Task, inputs: Inputs) -> int:
    return task.pipeline.rounds(len(inputs.experts)) if task.pipeline is not None else 0
