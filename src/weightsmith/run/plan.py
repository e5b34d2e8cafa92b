"""Everything that can be known before the first tensor is read: what is done to what, how, and all problems."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith.errors import PlanError
from weightsmith.io.source import Source
from weightsmith.keys import Key
from weightsmith.recipe.schema import Recipe
from weightsmith.run.cost import estimate
from weightsmith.run.inputs import Inputs, open_inputs
from weightsmith.run.planner import Planner
from weightsmith.run.task import Task

__all__ = ["Coverage", "InputInfo", "Plan", "cores", "make_plan"]

RESIDENT = 330 << 20
"""Bytes of a process that has Python, torch and the kernels loaded (measured: 300 to 330 MB)."""


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

    @property
    def write_bytes(self) -> int:
        return sum(key.nbytes for key in self.keys)

    @property
    def read_bytes(self) -> int:
        return sum(i.nbytes for i in self.inputs) * (1 + self.passes)

    @property
    def seconds(self) -> float | None:
        """Rough estimate for one core of the reference machine, see `run.cost`; None if a method declares no cost."""
        experts = sum(i.role == "expert" for i in self.inputs)
        own = estimate(self.tasks, experts, self.read_bytes, self.write_bytes)
        return None if own is None else own + self.nested_seconds * (1 + self.passes)


def make_plan(
    recipe: Recipe,
    *,
    sources: Inputs | None = None,
    memory: int | None = None,
    threads: int | None = None,
    out: Path | None = None,
    strict: bool = True,
    encode: bool = False,
) -> Plan:
    """Plan a merge, or with `encode` a compression, from headers alone.

    `memory` bounds the predicted peak in bytes (fewer threads are used to keep it), `threads` defaults to
    the cores at hand.  Raises PlanError with every problem found; with `strict=False` the plan holds them.
    """
    if sources is None:
        sources = open_inputs(recipe)
    planner = Planner(recipe, sources, encode=encode)
    tasks = planner.tasks()
    keys = planner.output_keys(tasks)
    problems = [*sources.problems, *planner.problems]
    notes = list(planner.notes)
    free = None
    if out is not None:
        free = _free_bytes(out)
    workers, peak = _workers(tasks, threads, memory, problems)
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
        nested_seconds=sum(getattr(source, "seconds", None) or 0.0 for _, source in sources.models),
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
            label=source.label,
            tensors=len(source.keys),
            nbytes=sum(kinds.values()),
            dtype=kinds.most_common(1)[0][0] if kinds else "",
            download_bytes=int(getattr(source, "download_bytes", 0)),
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


def _workers(tasks: list[Task], threads: int | None, memory: int | None, problems: list[str]) -> tuple[int, int]:
    """Thread count and predicted peak: as many threads as asked for (or cores), fewer if memory is short."""
    wanted = threads or cores()
    peaks = sorted((t.peak for t in tasks), reverse=True) or [0]
    for workers in range(max(1, min(wanted, max(len(tasks), 1))), 0, -1):
        peak = RESIDENT + sum(peaks[:workers])
        if memory is None or peak <= memory:
            return workers, peak
    largest = max(tasks, key=lambda t: t.peak)
    problems.append(
        f"--memory {(memory or 0) / 1e6:,.0f} MB is too little: {largest.key.name} alone needs {peak / 1e6:,.0f} MB"
    )
    return 1, peak


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_bytes(out: Path) -> int | None:
    for folder in (out, *out.absolute().parents):
        if folder.exists():
            return shutil.disk_usage(folder).free
    return None
