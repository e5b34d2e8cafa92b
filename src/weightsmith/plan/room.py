"""What a run takes of the machine: threads, memory and devices, from the predicted bytes of its tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightsmith.core.method import Stage
from weightsmith.core.problem import Code, Problems
from weightsmith.core.settings import Settings, cores
from weightsmith.core.task import Task, Way
from weightsmith.devices.accelerator import Accelerator, accelerator_of
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.remote import HELD
from weightsmith.io.url import Url, parse_url
from weightsmith.plan.costs import costs_of
from weightsmith.plan.fit import Fit, Work, fitted

__all__ = ["Fit", "Machine", "Room", "resident"]

PYTHON, KERNELS, TORCH = 50_000_000, 3_000_000, 205_000_000
"""Bytes of a process with what every merge imports, and what the fused kernels and torch take besides (measured)."""

NETWORK = 40_000_000
"""The same for fsspec and a store's library (measured with fsspec and aiohttp); pieces under way come on top."""


@dataclass(frozen=True)
class Room:
    """What a run takes.

    task_bytes  predicted peak of a process that does one thing at a time
    fit         how devices are used; None: the CPU does it
    """

    threads: int
    peak_bytes: int
    task_bytes: int
    fit: Fit | None = None


@dataclass(frozen=True)
class Machine:
    """Where a run takes place, and the bounds that were set for it."""

    accelerator: Accelerator | None
    threads: int | None
    memory: int | None

    @classmethod
    def of(cls, settings: Settings) -> Machine:
        return cls(accelerator_of(settings.device), settings.threads, settings.memory)

    def room(
        self,
        work: Sequence[tuple[tuple[Task, ...], Inputs]],
        peaks: Sequence[int],
        loaded: int,
        problems: Problems,
        held: int = 0,
    ) -> Room:
        """Fewer threads, or lanes of devices, than asked for are used to keep the bound on memory.

        work    tasks that are done together (variants of a sweep; else one), and what they read
        peaks   predicted bytes of each of these
        loaded  bytes of the process beside its tasks on the CPU, see `resident`
        held    bytes of results that stay in memory
        """
        largest = max(peaks, default=0)
        loaded += held
        if self.accelerator is None:
            named = [(peak, tasks[0].key.name) for peak, (tasks, _) in zip(peaks, work, strict=True)]
            workers, peak = _on_cpu(named, self.threads, self.memory, problems, loaded)
            return Room(workers, peak, loaded + largest)
        loaded = PYTHON + TORCH + self.accelerator.resident + held
        pieces = [Work(tasks, inputs) for tasks, inputs in work]
        fit, peak = fitted(
            pieces, self.accelerator, memory=self.memory, threads=self.threads, loaded=loaded, problems=problems
        )
        return Room(fit.threads, peak, loaded + largest, fit)


def _on_cpu(
    tasks: Sequence[tuple[int, str]], threads: int | None, memory: int | None, problems: Problems, loaded: int
) -> tuple[int, int]:
    """Thread count and predicted peak: as many threads as asked for (or cores), fewer if memory is short.

    tasks   (predicted bytes, tensor) of whatever one thread does at a time
    """
    wanted = threads or cores()
    peaks = sorted((peak for peak, _ in tasks), reverse=True) or [0]
    for workers in range(max(1, min(wanted, max(len(tasks), 1))), 0, -1):
        peak = loaded + sum(peaks[:workers])
        if memory is None or peak <= memory:
            return workers, peak
    _, largest = max(tasks)
    least = math.ceil(peak / 1e6)
    text = f"--memory {(memory or 0) / 1e6:,.0f} MB is too little: {largest} alone needs {least:,} MB"
    problems.say(Code.MEMORY, "memory", text)
    return 1, peak


def resident(tasks: Iterable[Task], inputs: Inputs, torch: bool = False) -> int:
    """Bytes of the process beside its tasks: fused merges and plain copies need no torch, other merges no kernels;
    what sources hold for all of them.  `torch`: what is made of the results needs it."""
    kernels = False
    for task in tasks:
        if task.pipeline is None:
            source = inputs.experts[task.source] if task.source else inputs.base
            assert source is not None
            torch = torch or source.computes(task.key.name) or source.key(task.key.name).dtype != task.keys[0].dtype
        elif task.way is Way.KERNEL:
            kernels = True
        else:
            torch = True
    elsewhere = any(isinstance(parse_url(location), Url) for location in inputs.locations())
    held = sum(source.origin.cost.held for _, source in inputs.models)
    stages = {stage.traits.name: costs_of(stage).imports for task in tasks for stage in _used(task)}
    libraries = KERNELS * kernels + TORCH * torch + NETWORK * elsewhere + sum(stages.values())
    return PYTHON + libraries + held + HELD * elsewhere


def _used(task: Task) -> tuple[Stage, ...]:
    return task.pipeline.used if task.pipeline is not None else ()
