"""Merges that are made to be looked at once: many recipes in one pass over the models, nothing flushed to the disk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import PlanError, WeightsmithError
from weightsmith.core.problem import Problem, Problems
from weightsmith.core.settings import Settings
from weightsmith.core.units import parse_size
from weightsmith.engine import carry
from weightsmith.engine.model import Bundle, side_by_side
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import remove, write_file, writing
from weightsmith.io.write.layout import indices
from weightsmith.io.write.scratch import ScratchSink
from weightsmith.io.write.sink import MemorySink, Sink
from weightsmith.jobs.job import Job
from weightsmith.jobs.merge import merge_job
from weightsmith.jobs.nested import open_inputs
from weightsmith.jobs.package import companions
from weightsmith.jobs.sweep import bytes_shared, peak_together, what_is_read
from weightsmith.plan.fit import Work
from weightsmith.plan.room import Machine, Room, resident
from weightsmith.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch", "Workshop"]


@dataclass(frozen=True)
class Batch:
    """What came of some recipes, by name.

    made        a folder each, or tensors by name; whoever is done with them clears it
    failed      why a recipe could not be merged
    read_bytes  what several share counts once
    """

    made: dict[str, Path | dict[str, Tensor]]
    failed: Mapping[str, WeightsmithError]
    read_bytes: int


class Workshop:
    """Makes merges in the folder `room`, or in memory; models are opened once, however many recipes name them."""

    def __init__(self, room: Path, settings: Settings, inputs: Mapping[str, Any] | None = None) -> None:
        self.room, self.settings, self._given = room, settings, inputs
        self._opened: dict[str, Inputs] = {}
        self._lent: dict[str, dict[str, np.ndarray]] = {}
        self._spare: list[dict[str, np.ndarray]] = []
        self._folders: list[Path] = []

    def inputs(self, recipe: Recipe) -> Inputs:
        """A recipe's models, opened; that it may speak of tensors of models which are left out is no problem."""
        if (key := what_is_read(recipe)) not in self._opened:
            self._opened[key] = replace(open_inputs(recipe, self._given), partial=True)
        return self._opened[key]

    def plan(self, recipe: Recipe) -> Job:
        """The job of a recipe; PlanError for all that speaks against it."""
        job = merge_job(recipe, self.settings, self.room / "candidate", self.inputs(recipe))
        if job.plan.problems:
            raise PlanError(job.plan.problems)
        return job

    def fitting(self, recipes: Sequence[Recipe], *, in_memory: bool = False) -> int:
        """How many of the first of these `make` can make together within the bound on memory; at least 1."""
        if self.settings.memory is None or len(recipes) < 2:
            return len(recipes)
        jobs: list[Job] = []
        for recipe in recipes:
            try:
                jobs.append(self.plan(recipe))
            except WeightsmithError:  # which `make` tells of
                return max(len(jobs), 1)
        return next((n for n in range(len(jobs), 1, -1) if not self._room(jobs[:n], in_memory)[2]), 1)

    def peak(self, recipe: Recipe, count: int, *, in_memory: bool = False) -> tuple[int, int]:
        """How many of `count` merges that differ in numbers from a recipe are made together, and the bytes they take.

        Raises PlanError where not even one fits.
        """
        job = self.plan(recipe)
        for n in range(count, 0, -1):
            _, room, problems = self._room([job] * n, in_memory)
            if not problems:
                return n, room.peak_bytes
        raise PlanError(problems)

    def make(self, recipes: Mapping[str, Recipe], *, in_memory: bool = False) -> Batch:
        """Merge recipes side by side; one that fails does not keep the others from being made."""
        jobs: dict[str, Job] = {}
        failed: dict[str, WeightsmithError] = {}
        for name, recipe in recipes.items():
            try:
                jobs[name] = self.plan(recipe)
                jobs[name].prepare()
                if in_memory:
                    jobs[name].plan.refuse_tangent()
            except WeightsmithError as error:
                failed[name] = error
        try:
            made, read = self._carried_out(jobs, in_memory) if jobs else ({}, 0)
        except WeightsmithError as error:
            self._drop(self.room / name for name in jobs)
            if len(jobs) == 1:
                return Batch({}, {**failed, next(iter(jobs)): error}, 0)
            apart = [self.make({name: recipes[name]}, in_memory=in_memory) for name in jobs]
            return Batch(
                {name: one for batch in apart for name, one in batch.made.items()},
                {**failed, **{name: why for batch in apart for name, why in batch.failed.items()}},
                sum(batch.read_bytes for batch in apart),
            )
        return Batch(made, failed, read)

    def release(self, name: str, *, keep: bool = False) -> None:
        """Be done with a merge that was looked at: delete it, or keep its room for the next one.

        Buffers are kept as far as nobody refers to them; a folder where `keep` says that nobody has mapped its files.
        """
        folder = self.room / name
        if (lent := self._lent.pop(name, None)) is not None:
            self._spare.append(_unheld(lent))
        elif keep and folder.is_dir():
            self._folders.append(folder)
        else:
            with writing(self.room):
                remove(folder)

    def _drop(self, folders: Iterable[Path]) -> None:
        """Delete merges that failed, and what was kept for the next ones: a disk may be full."""
        with writing(self.room):
            for folder in (*folders, *self._folders):
                remove(folder)
        self._folders.clear()
        self._spare.clear()

    def clear(self) -> None:
        """Delete all, also what a run that was killed has left."""
        self._lent.clear()
        self._spare.clear()
        self._folders.clear()
        with writing(self.room):
            remove(self.room)

    def _carried_out(self, jobs: Mapping[str, Job], in_memory: bool) -> tuple[dict[str, Any], int]:
        bundles, room, problems = self._room(list(jobs.values()), in_memory)
        if problems:
            raise PlanError(problems)
        sinks = {name: self._sink(name, job, in_memory) for name, job in jobs.items()}
        parts = [carry.Job(job.plan, job.inputs, sinks[name]) for name, job in jobs.items()]
        carry.carry_out_all(parts, threads=room.threads, fit=room.fit)
        read = sum(bytes_shared(bundle, [job.inputs for job in jobs.values()]) for bundle in bundles)
        found: dict[str, Any] = {}
        for name, job in jobs.items():
            sink = sinks[name]
            if isinstance(sink, MemorySink):
                self._lent[name] = sink.bits
                found[name] = job.with_aliases(sink.tensors())
            else:
                assert isinstance(sink, ScratchSink)
                found[name] = _packed(sink, job)
        return found, read

    def _room(self, jobs: Sequence[Job], in_memory: bool) -> tuple[Sequence[Bundle], Room, tuple[Problem, ...]]:
        """What jobs side by side take; in memory their results are held all at once, until somebody has looked."""
        inputs = [job.inputs for job in jobs]
        bundles = side_by_side([job.plan.tasks for job in jobs])
        work = [Work(tuple(task for _, task in bundle), inputs[bundle[0][0]]) for bundle in bundles]
        loaded = max(resident(job.plan.tasks, job.inputs, torch=in_memory) for job in jobs)
        held = sum(job.plan.write_bytes for job in jobs) if in_memory else 0
        problems = Problems()
        peaks = [peak_together(one) for one in work]
        room = Machine.of(self.settings).room(work, peaks, loaded, problems, held)
        return bundles, room, tuple(problems)

    def _sink(self, name: str, job: Job, in_memory: bool) -> Sink:
        if in_memory:
            return MemorySink(self._spare.pop() if self._spare else None)
        size = parse_size(job.plan.recipe.output.shard_size)
        spare = self._folders.pop() if self._folders else None
        return ScratchSink(
            self.room / name, shard_size=size, weight_name=job.weights, metadata=job.metadata, spare=spare
        )


def _unheld(bits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The buffers that nobody else refers to: fresh ones cost a page fault for every 4 KB."""
    found = {}
    while bits:
        name, array = bits.popitem()
        if sys.getrefcount(array) == 2:  # the variable, and the argument of this call
            found[name] = array
    return found


def _packed(sink: ScratchSink, job: Job) -> Path:
    sink.close()
    for name, text in indices(sink.shards).items():
        write_file(sink.folder / name, text)
    with writing(sink.folder):
        companions(job, sink.folder)
    return sink.folder
