"""Several variants of a recipe in one run: every block of the inputs is read and decoded once.

Each variant becomes a folder of its own inside OUT, complete and verifiable like that of a single merge, and with
the same bytes.  All of them are laid out, journalled and resumed as single merges are.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, PlanError, some
from weightsmith.core.keys import DTYPES
from weightsmith.core.problem import Code, Problem, Problems
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.task import Task, Way, block_size, one_by_one
from weightsmith.engine.model import Bundle, side_by_side
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.disk import allocated, gigabytes, writing
from weightsmith.io.package.manifest import MANIFEST
from weightsmith.io.url import absolute
from weightsmith.jobs.job import Job, Result, carried_out, with_fingerprints
from weightsmith.jobs.merge import merge_job
from weightsmith.jobs.nested import open_inputs
from weightsmith.kernels.merge import TOGETHER
from weightsmith.plan.fit import Work
from weightsmith.plan.plan import Plan
from weightsmith.plan.reading import bytes_read
from weightsmith.plan.room import Machine, Room, resident
from weightsmith.recipe.schema import ModelRef, Recipe

__all__ = [
    "Sweep",
    "SweepResult",
    "bytes_shared",
    "peak_together",
    "plan_sweep",
    "run_sweep",
    "variants_in",
    "what_is_read",
]

_STATE = 1 << 20
"""Bytes per expert that a variant keeps between two of its turns: what is counted for it in a measuring pass."""


@dataclass(frozen=True)
class Sweep:
    """The jobs of all variants, by folder name, and what they take together.  No tensor in it.

    done        variants that the run to resume has finished
    read_bytes  what several variants share counts once
    """

    out: Path
    jobs: Mapping[str, Job]
    done: frozenset[str]
    room: Room
    problems: tuple[Problem, ...]
    read_bytes: int

    @property
    def plans(self) -> dict[str, Plan]:
        return {name: job.plan for name, job in self.jobs.items()}

    @property
    def write_bytes(self) -> int:
        return sum(plan.write_bytes for plan in self.plans.values())


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did; `variants` maps folder names to what a single merge would have said."""

    out: Path
    variants: Mapping[str, Result]
    seconds: float
    read_bytes: int
    write_bytes: int
    peak_bytes: int


def plan_sweep(
    recipes: Mapping[str, Recipe],
    out: Path,
    settings: Settings = DEFAULT,
    *,
    sources: Inputs | None = None,
    **options: Any,
) -> Sweep:
    """Plan every variant (folder name -> recipe) from headers alone.  The problems are in the result, not raised."""
    settings = settings.but(**options)
    alone = settings.but(memory=None)  # what they take is a matter of all of them
    opened: dict[str, Inputs] = {}
    jobs: dict[str, Job] = {}
    for name, recipe in recipes.items():
        if (key := what_is_read(recipe)) not in opened:
            opened[key] = with_fingerprints(sources if sources is not None else open_inputs(recipe), settings)
        jobs[name] = merge_job(recipe, alone, out / name, opened[key])
    done = frozenset(name for name, job in jobs.items() if settings.resume and job.finished(out / name))
    problems = _problems(jobs, done, out, settings)
    inputs = [job.inputs for job in jobs.values()]
    bundles = side_by_side([job.plan.tasks for job in jobs.values()])
    work = [Work(tuple(task for _, task in bundle), inputs[bundle[0][0]]) for bundle in bundles]
    loaded = max(resident(job.plan.tasks, job.inputs) for job in jobs.values())
    room = Machine.of(settings).room(work, [peak_together(one) for one in work], loaded, problems)
    read = 0 if problems else sum(bytes_shared(bundle, inputs) for bundle in bundles)
    return Sweep(absolute(out), jobs, done, room, tuple(problems), read)


def _problems(jobs: Mapping[str, Job], done: Collection[str], out: Path, settings: Settings) -> Problems:
    """What is wrong with single variants, those who have it named, or with all of them together."""
    found: dict[Problem, list[str]] = {}
    for name, job in jobs.items():
        more = [] if name in done else job.obstacles(out / name, settings)
        for problem in (*job.plan.problems, *more):
            found.setdefault(problem, []).append(name)
    problems = Problems()
    problems.add(*(one if len(names) == len(jobs) else one.of(", ".join(names)) for one, names in found.items()))
    if not found:
        problems.add(*_obstacles(out, {name: job.plan for name, job in jobs.items() if name not in done}))
    return problems


def run_sweep(
    recipes: Mapping[str, Recipe],
    out: Path,
    settings: Settings = DEFAULT,
    *,
    sources: Inputs | None = None,
    **options: Any,
) -> SweepResult:
    """Merge every variant (folder name -> recipe) into a folder of that name inside `out`.

    Options change single settings.  Each variant's folder appears complete or not at all; an
    interrupted sweep is taken up again with `resume`, finished variants are left as they are.

    Raises PlanError with every problem before anything is written.
    """
    began = time.perf_counter()
    settings = settings.but(**options)
    sweep = plan_sweep(recipes, out, settings, sources=sources)
    if sweep.problems:
        raise PlanError(sweep.problems)
    left = {out / name: job for name, job in sweep.jobs.items() if name not in sweep.done}
    found = dict(zip(left, carried_out(left, sweep.room, settings), strict=True)) if left else {}
    seconds = time.perf_counter() - began
    variants = {
        name: job.result(out / name, seconds, found.get(out / name, job.plan.warnings), complete=name in sweep.done)
        for name, job in sweep.jobs.items()
    }
    return SweepResult(sweep.out, variants, seconds, sweep.read_bytes, sweep.write_bytes, sweep.room.peak_bytes)


def variants_in(out: Path) -> dict[str, Path]:
    """The finished variants in a sweep's folder: name -> folder; none where the folder is a result itself.

    Raises OutputError where one was interrupted.
    """
    if (out / MANIFEST).exists() or not out.is_dir():
        return {}
    folders = sorted(path for path in system.call(list, out.iterdir()) if path.is_dir())
    begun = [path.name for path in folders if path.name.endswith(".partial")]
    found = {path.name: path for path in folders if (path / MANIFEST).is_file()}
    if begun and (found or len(begun) > 1):
        raise OutputError(f"{out}: {some(begun)}: interrupted; go on with the same command and --resume")
    return found


def what_is_read(recipe: Recipe) -> str:
    """Equal for recipes with the same base, models and statistics; the models' own parameters do not count."""
    fields = tuple(ModelRef.model_fields)
    read = {name: {f: getattr(ref, f) for f in fields} for name, ref in recipe.models.items()}
    return repr((recipe.base, read))


def bytes_shared(bundle: Bundle, inputs: Sequence[Inputs]) -> int:
    """Bytes that tasks side by side read: of the same inputs, what the one that reads most does."""
    total = 0
    for read in {id(inputs[i]): inputs[i] for i, _ in bundle}.values():
        tasks = [task for i, task in bundle if inputs[i] is read]
        total += max(bytes_read(t, read, [other for other in tasks if other is not t]) for t in tasks)
    return total


def peak_together(work: Work) -> int:
    """Predicted bytes of tasks that go on side by side: they share what is read, and take turns with the rest.

    What one task reads expert by expert is held for several.
    """
    tasks, experts = work.tasks, len(work.inputs.experts)
    held = max((4 * t.key.numel * (experts - 1) for t in tasks[1:] if one_by_one(t.pipeline)), default=0)
    state = [
        0 if t.pipeline is None or not t.pipeline.passes(experts) else experts * (_STATE + 8 * (t.stop - t.start))
        for t in tasks
    ]
    return max(task.peak for task in tasks) + held + sum(sorted(state)[:-1]) + _side_by_side(tasks, work.inputs)


def _side_by_side(tasks: Sequence[Task], inputs: Inputs) -> int:
    """Bytes of the results, beside the first, that the kernels make of a block in one go."""
    made = [task for task in tasks if task.way is Way.KERNEL][1:TOGETHER]
    entries = block_size(len(inputs.models))
    return sum(min(max(entries, t.key.row_numel), t.key.numel) * DTYPES[t.key.dtype].itemsize for t in made)


def _obstacles(out: Path, plans: Mapping[str, Plan]) -> list[Problem]:
    """What speaks against all variants together."""
    out = absolute(out)
    if (out / MANIFEST).exists() or (out / "config.json").exists():
        return [
            Problem(Code.OUTPUT, str(out), f"{out} is a model; the variants need a folder of their own to stand in")
        ]
    need = sum(plan.write_bytes for plan in plans.values())
    with writing(out):
        ground = next(folder for folder in (out, *out.parents) if folder.exists())
        begun = [work for name in plans if (work := out / f"{name}.partial").exists()]
        free = system.call(shutil.disk_usage, ground).free + sum(map(allocated, begun))
    if need <= free:
        return []
    text = f"{len(plans)} variants need {gigabytes(need)} in {out}, but {gigabytes(free)} are free on its disk; "
    return [Problem(Code.DISK, str(out), text + "free some space or sweep over fewer values")]
