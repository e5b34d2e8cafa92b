"""Everything that can be known before the first tensor is read: what is done to what, how, and all problems."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError
from weightsmith.core.keys import Key
from weightsmith.core.problem import Code, Problem, Problems
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.task import Task
from weightsmith.inputs import vocabulary
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.io.package.manifest import lock_of
from weightsmith.io.package.tangent import Tangent
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url, parse_url
from weightsmith.plan.cost import estimate
from weightsmith.plan.planner import Planner
from weightsmith.plan.reading import all_bytes_read
from weightsmith.plan.room import Fit, Machine, Room, resident
from weightsmith.plan.tangents import tangents
from weightsmith.plan.way import kernels_there
from weightsmith.recipe.schema import Recipe

__all__ = ["Coverage", "InputInfo", "Plan", "make_plan"]


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
    room: Room
    free_bytes: int | None
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    depth: Mapping[str, float] = field(default_factory=dict)
    tangent: Tangent | None = None
    nested_seconds: float = 0.0
    """Of the inputs that are merges themselves, computed as they are read."""
    read_bytes: int = 0
    """Of all inputs, as often as they are read."""
    result: Mapping[str, str] = field(default_factory=dict)
    """What a merge will be, in words: its dtype, vocabulary, tokenizer, chat template."""

    @property
    def threads(self) -> int:
        return self.room.threads

    @property
    def peak_bytes(self) -> int:
        return self.room.peak_bytes

    @property
    def fit(self) -> Fit | None:
        return self.room.fit

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

    def refuse_tangent(self) -> None:
        """Raise PlanError where the result has a meaning in a tangent space only: tensors in memory carry no mark."""
        if self.tangent is not None:
            said = "are run from folders, which say so; merge to one, or cast them"
            raise PlanError([f"models linearised around {self.tangent} {said}"])


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
    machine = Machine.of(settings)
    planner = Planner(recipe, sources, encode=encode, kernels=machine.accelerator is None and kernels_there())
    tasks = planner.tasks()
    keys = planner.output_keys(tasks)
    problems, warnings = Problems(), [*planner.warnings, *_locked(sources)]
    linear = tangents(recipe, sources)
    problems.add(*sources.problems, *planner.problems, *linear.problems)
    if linear.result is not None:
        warnings += _rounded(keys)
    free = None
    if out is not None:
        free = _free_bytes(out)
    work = [((task,), sources) for task in tasks]
    room = machine.room(work, [task.peak for task in tasks], resident(tasks, sources), problems)
    if room.fit is not None and room.fit.note:
        warnings.append(Problem(Code.DEVICE, "device", room.fit.note))
    plan = Plan(
        recipe=recipe,
        inputs=tuple(_info(sources)),
        keys=tuple(keys),
        tasks=tuple(tasks),
        coverage=tuple(_coverage(tasks)),
        passes=max((t.pipeline.rounds(len(sources.experts)) for t in tasks if t.pipeline), default=0),
        room=room,
        free_bytes=free,
        problems=tuple(problems),
        warnings=tuple(warnings),
        depth=planner.depth,
        tangent=linear.result,
        nested_seconds=sum(source.origin.cost.seconds for _, source in sources.models),
        read_bytes=0 if problems else all_bytes_read(tasks, sources),
    )
    if not plan.problems and not encode:
        plan = replace(plan, result=vocabulary.outlook(recipe, sources, plan.keys))
    if strict and plan.problems:
        raise PlanError(plan.problems)
    return plan


def _locked(sources: Inputs) -> list[Problem]:
    """A warning where models lie in different bases: locked by different keys, or some of them not locked."""
    keys = {name: lock_of(source.origin.folder).get("key") for name, source in sources.models}
    if len(set(keys.values())) < 2:
        return []
    locked = ", ".join(name for name, key in keys.items() if key)
    text = f"{locked}: locked, so in another basis than the rest, and a merge makes no sense of both; unlock first"
    return [Problem(Code.SOURCE, "models", text)]


def _rounded(keys: Iterable[Key]) -> list[Problem]:
    """A warning where a dtype would lose the small distances from the point that models were linearised around."""
    narrow = sorted({key.dtype for key in keys if key.floating and key.dtype not in ("float32", "float64")})
    if not narrow:
        return []
    text = f"linearised models are small steps from one point, which {narrow[0]} rounds away; set output.dtype: float32"
    return [Problem(Code.DTYPE, "output", text)]


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


def _free_bytes(out: Path) -> int | None:
    if isinstance(parse_url(out), Url):
        return None
    with writing(out):
        for folder in (out, *out.absolute().parents):
            if folder.exists():
                return system.call(shutil.disk_usage, folder).free
    return None
