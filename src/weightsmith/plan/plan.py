"""Everything that can be known before the first tensor is read: what is done to what, how, and all problems."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError
from weightsmith.core.keys import Key
from weightsmith.core.method import Stage
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.task import Task, Way
from weightsmith.engine.devices.accelerator import accelerator_of
from weightsmith.engine.devices.device import Fit, Work, fitted
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.io.read.remote import HELD
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url, parse_url
from weightsmith.plan.cost import estimate
from weightsmith.plan.planner import Planner
from weightsmith.plan.reading import all_bytes_read
from weightsmith.plan.way import kernels_there
from weightsmith.recipe.schema import Recipe

__all__ = ["Coverage", "InputInfo", "Plan", "choose_threads", "cores", "make_plan", "resident"]

PYTHON, KERNELS, TORCH = 55_000_000, 55_000_000, 205_000_000
"""Bytes of a process with what every merge imports, and what the fused kernels and torch take besides (measured)."""

NETWORK = 40_000_000
"""The same for fsspec and a store's library (measured with fsspec and aiohttp); pieces under way come on top."""


@dataclass(frozen=True)
class InputInfo:
    """One input as the plan's table shows it."""

    name: str
    role: str  # base, expert, stats
    label: str
    tensors: int
    nbytes: int
    dtype: str
    download_bytes: int = 0


@dataclass(frozen=True)
class Coverage:
    """What happens to a class of tensors, and to how many."""

    description: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """The whole run as a value: printable, picklable, no tensor in it."""

    recipe: Recipe
    inputs: tuple[InputInfo, ...]
    keys: tuple[Key, ...]
    tasks: tuple[Task, ...]
    coverage: tuple[Coverage, ...]
    passes: int
    threads: int
    peak_bytes: int
    free_bytes: int | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    depth: Mapping[str, float] = field(default_factory=dict)
    nested_seconds: float = 0.0
    """Of the inputs that are merges themselves, computed as they are read."""
    task_bytes: int = 0
    """Predicted peak of a process that does one task at a time."""
    fit: Fit | None = None
    """How devices are used; None: the CPU does it."""
    read_bytes: int = 0
    """Of all inputs, as often as they are read."""

    @property
    def device(self) -> str:
        """The kind of devices whose bytes the result has; '' for the CPU's."""
        return "" if self.fit is None or self.fit.accelerator.exact else self.fit.accelerator.kind

    @property
    def write_bytes(self) -> int:
        return sum(key.nbytes for key in self.keys)

    @property
    def readings(self) -> float:
        """How often the inputs are read, on average."""
        return self.read_bytes / max(sum(i.nbytes for i in self.inputs), 1)

    @property
    def seconds(self) -> float | None:
        """Rough estimate for one core of the reference machine, see `plan.cost`; None if a method declares no cost."""
        experts = sum(i.role == "expert" for i in self.inputs)
        own = estimate(self.tasks, experts, self.read_bytes, self.write_bytes)
        return None if own is None else own + self.nested_seconds * self.readings


def make_plan(
    recipe: Recipe,
    settings: Settings = DEFAULT,
    *,
    sources: Inputs,
    out: Path | None = None,
    strict: bool = True,
    encode: bool = False,
    **options: Any,
) -> Plan:
    """Plan a merge, or with `encode` a compression, from headers alone.

    Fewer threads than asked for are used to keep the bound on memory; on devices, their lanes are the threads.
    Options change single fields of the settings.
    Raises PlanError with every problem found; with `strict=False` the plan holds them.
    """
    settings = settings.but(**options)
    memory, threads = settings.memory, settings.threads
    accelerator = accelerator_of(settings.device)
    planner = Planner(recipe, sources, encode=encode, kernels=accelerator is None and kernels_there())
    tasks = planner.tasks()
    keys = planner.output_keys(tasks)
    problems = [*sources.problems, *planner.problems]
    notes = list(planner.notes)
    free = None
    if out is not None:
        free = _free_bytes(out)
    loaded = resident(tasks, sources) if accelerator is None else PYTHON + TORCH + accelerator.resident
    fit = None
    if accelerator is None:
        workers, peak = choose_threads([(t.peak, t.key.name) for t in tasks], threads, memory, problems, loaded)
    else:
        work = [Work((task,), sources) for task in tasks]
        fit, peak = fitted(work, accelerator, memory=memory, threads=threads, loaded=loaded, problems=problems)
        workers = fit.threads
        notes += [fit.note] if fit.note else []
    plan = Plan(
        recipe=recipe,
        inputs=tuple(_info(sources)),
        keys=tuple(keys),
        tasks=tuple(tasks),
        coverage=tuple(_coverage(tasks)),
        passes=max((len(t.pipeline.steps) for t in tasks if t.pipeline), default=0),
        threads=workers,
        peak_bytes=peak,
        free_bytes=free,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
        depth=planner.depth,
        nested_seconds=sum(source.origin.cost.seconds for _, source in sources.models),
        task_bytes=loaded + max((task.peak for task in tasks), default=0),
        fit=fit,
        read_bytes=0 if problems else all_bytes_read(tasks, sources),
    )
    if strict and plan.problems:
        raise PlanError(plan.problems)
    return plan


def _info(inputs: Inputs) -> Iterable[InputInfo]:
    named: list[tuple[str, str, Source]] = []
    if inputs.base is not None:
        named.append(("base", "base", inputs.base))
    named += [(name, "expert", s) for name, s in inputs.experts.items()]
    named += [(f"{name}/{stat}", "stats", s) for stat, by in inputs.stats.items() for name, s in by.items()]
    for name, role, source in named:
        kinds = Counter({k.dtype: 0 for k in source.keys.values()})
        for key in source.keys.values():
            kinds[key.dtype] += key.nbytes
        yield InputInfo(
            name=name,
            role=role,
            label=source.origin.label,
            tensors=len(source.keys),
            nbytes=sum(kinds.values()),
            dtype=kinds.most_common(1)[0][0] if kinds else "",
            download_bytes=source.origin.cost.download,
        )


def _coverage(tasks: Iterable[Task]) -> Iterable[Coverage]:
    found: dict[str, tuple[set[str], int]] = {}
    for task in tasks:
        if task.pipeline is None:
            text = f"copied from {task.source or 'base'} ({task.reason})"
        else:
            done = "compressed" if task.pipeline.codec is not None else "merged"
            text = f"{done} by {task.pipeline.name}" + (f" ({task.reason})" if task.reason else "")
        names, numel = found.get(text, (set(), 0))
        names |= {k.name for k in task.keys} if task.group else {task.key.name}
        size = sum(k.numel for k in task.keys) if task.group else (task.stop - task.start) * task.key.row_numel
        found[text] = (names, numel + size)
    return [Coverage(text, len(names), numel) for text, (names, numel) in found.items()]


def choose_threads(
    tasks: Sequence[tuple[int, str]], threads: int | None, memory: int | None, problems: list[str], loaded: int
) -> tuple[int, int]:
    """Thread count and predicted peak: as many threads as asked for (or cores), fewer if memory is short.

    tasks   (predicted bytes, tensor) of whatever one thread does at a time
    loaded  bytes of the process beside its tasks, see `resident`
    """
    wanted = threads or cores()
    peaks = sorted((peak for peak, _ in tasks), reverse=True) or [0]
    for workers in range(max(1, min(wanted, max(len(tasks), 1))), 0, -1):
        peak = loaded + sum(peaks[:workers])
        if memory is None or peak <= memory:
            return workers, peak
    _, largest = max(tasks)
    least = math.ceil(peak / 1e6)
    problems.append(f"--memory {(memory or 0) / 1e6:,.0f} MB is too little: {largest} alone needs {least:,} MB")
    return 1, peak


def resident(tasks: Iterable[Task], inputs: Inputs) -> int:
    """Bytes of the process beside its tasks: fused merges and plain copies need no torch, other merges no kernels;
    what sources hold for all of them."""
    kernels = torch = False
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
    stages = {stage.traits.name: stage.traits.imports for task in tasks for stage in stages_of(task)}
    libraries = KERNELS * kernels + TORCH * torch + NETWORK * elsewhere + sum(stages.values())
    return PYTHON + libraries + held + HELD * elsewhere


def stages_of(task: Task) -> tuple[Stage, ...]:
    """The stages that work on a task."""
    return task.pipeline.used if task.pipeline is not None else ()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_bytes(out: Path) -> int | None:
    if isinstance(parse_url(out), Url):
        return None
    with writing(out):
        for folder in (out, *out.absolute().parents):
            if folder.exists():
                return system.call(shutil.disk_usage, folder).free
    return None
