"""Several variants of a recipe in one run: every block of the inputs is read and decoded once.

Each variant becomes a folder of its own inside OUT, complete and verifiable like that of a single merge, and with
the same bytes.  All of them are laid out, journalled and resumed as single merges are.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.task import one_by_one
from weightsmith.engine.carry import Bundle, Job, carry_out_all, side_by_side
from weightsmith.engine.cluster import ray_runner
from weightsmith.engine.devices.accelerator import accelerator_of
from weightsmith.engine.devices.device import Fit, Work, fitted
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.disk import allocated, gigabytes, writing
from weightsmith.io.package.manifest import MANIFEST
from weightsmith.io.url import absolute
from weightsmith.io.write.output import check_output
from weightsmith.jobs.merge import (
    Result,
    finished,
    folder_sink,
    licence_warnings,
    package,
    reads,
    result_of,
    with_fingerprints,
)
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import PYTHON, TORCH, Plan, choose_threads, make_plan, resident
from weightsmith.plan.reading import bytes_read
from weightsmith.plan.remarks import what_models_say, what_was_found
from weightsmith.recipe.schema import ModelRef, Recipe

__all__ = ["Sweep", "SweepResult", "plan_sweep", "run_sweep"]

_STATE = 1 << 20
"""Bytes per expert that a variant keeps between two of its turns: what is counted for it in a measuring pass."""


@dataclass(frozen=True)
class Sweep:
    """The plans of all variants, by folder name, and what they take together.  No tensor in it.

    done  variants that the run to resume has finished
    """

    out: Path
    plans: Mapping[str, Plan]
    inputs: Mapping[str, Inputs]
    done: frozenset[str]
    threads: int
    peak_bytes: int
    problems: tuple[str, ...]
    task_bytes: int = 0
    fit: Fit | None = None
    read_bytes: int = 0
    """What several variants share counts once."""

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
    memory, threads = settings.memory, settings.threads
    opened: dict[str, Inputs] = {}
    inputs: dict[str, Inputs] = {}
    for name, recipe in recipes.items():
        key = _what_is_read(recipe)
        if key not in opened:
            found = sources if sources is not None else open_inputs(recipe)
            opened[key] = with_fingerprints(found, settings)
        inputs[name] = opened[key]
    plans = {
        name: make_plan(recipe, settings, memory=None, sources=inputs[name], out=out / name, strict=False)
        for name, recipe in recipes.items()
    }
    done = {name for name, plan in plans.items() if settings.resume and finished(plan, inputs[name], out / name)}
    problems: dict[str, list[str]] = {}
    for name, plan in plans.items():
        places = (*reads(plan.recipe, inputs[name]), *settings.files)
        more = []
        if name not in done:
            more = check_output(out / name, places, settings.overwrite, settings.resume, plan.write_bytes)
        for text in (*plan.problems, *more):
            problems.setdefault(text, []).append(name)
    # What all variants have in common is said once.
    said = [text if len(names) == len(plans) else f"{', '.join(names)}: {text}" for text, names in problems.items()]
    said += [] if said else _obstacles(out, {name: plan for name, plan in plans.items() if name not in done})
    bundles = side_by_side([plan.tasks for plan in plans.values()])
    of_job = list(inputs.values())
    peaks = [(_peak(bundle, len(of_job[bundle[0][0]].experts)), bundle[0][1].key.name) for bundle in bundles]
    loaded = max(resident(plan.tasks, inputs[name]) for name, plan in plans.items())
    fit, accelerator = None, accelerator_of(settings.device)
    if accelerator is None:
        workers, peak = choose_threads(peaks, threads, memory, said, loaded)
    else:
        loaded = PYTHON + TORCH + accelerator.resident
        read = list(inputs.values())
        work = [Work(tuple(task for _, task in bundle), read[bundle[0][0]]) for bundle in bundles]
        fit, peak = fitted(work, accelerator, memory=memory, threads=threads, loaded=loaded, problems=said)
        workers = fit.threads
    return Sweep(
        absolute(out),
        plans,
        inputs,
        frozenset(done),
        workers,
        peak,
        tuple(said),
        loaded + max((nbytes for nbytes, _ in peaks), default=0),
        fit,
        0 if said else sum(_read(bundle, of_job) for bundle in bundles),
    )


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
    for inputs in sweep.inputs.values():
        for _, source in inputs.models:
            source.prepare()
    left = {name: plan for name, plan in sweep.plans.items() if name not in sweep.done}
    sinks = {name: folder_sink(plan, sweep.inputs[name], out / name, settings) for name, plan in left.items()}
    said = {name: list(plan.notes) for name, plan in sweep.plans.items()}
    if left:
        for name, plan in left.items():
            said[name] += what_models_say(plan.tasks, sweep.inputs[name], sinks[name].identity["inputs"])
        jobs = [Job(plan, sweep.inputs[name], sinks[name]) for name, plan in left.items()]
        with ray_runner(settings.ray, cpus=sweep.threads, memory=sweep.task_bytes) as runner:
            records = carry_out_all(
                jobs, threads=sweep.threads, fit=sweep.fit, progress=settings.progress, runner=runner
            )
        for (name, plan), found in zip(left.items(), records, strict=True):
            said[name] += what_was_found(plan.tasks, found, list(sweep.inputs[name].experts))
        try:
            for job, sink, found in zip(jobs, sinks.values(), records, strict=True):
                sink.finish(partial(package, plan=job.plan, inputs=job.inputs, records=found))
        except BaseException:
            for sink in sinks.values():
                sink.abort()
            raise
    seconds = time.perf_counter() - began
    variants = {
        name: result_of(plan, out / name, seconds, [*said[name], *licence_warnings(dict(sweep.inputs[name].models))])
        for name, plan in sweep.plans.items()
    }
    return SweepResult(sweep.out, variants, seconds, sweep.read_bytes, sweep.write_bytes, sweep.peak_bytes)


def _what_is_read(recipe: Recipe) -> str:
    """Equal for recipes with the same base, models and statistics; the models' own parameters do not count."""
    fields = tuple(ModelRef.model_fields)
    read = {name: {f: getattr(ref, f) for f in fields} for name, ref in recipe.models.items()}
    return repr((recipe.base, read))


def _read(bundle: Bundle, inputs: Sequence[Inputs]) -> int:
    """Bytes that tasks side by side read: of the same inputs, what the one that reads most does."""
    total = 0
    for read in {id(inputs[i]): inputs[i] for i, _ in bundle}.values():
        tasks = [task for i, task in bundle if inputs[i] is read]
        total += max(bytes_read(t, read, [other for other in tasks if other is not t]) for t in tasks)
    return total


def _peak(bundle: Bundle, experts: int) -> int:
    """Predicted bytes of tasks that go on side by side: they share what is read, and take turns with the rest.

    What one task reads expert by expert is held for several.
    """
    tasks = [task for _, task in bundle]
    held = max((4 * t.key.numel * (experts - 1) for t in tasks[1:] if one_by_one(t.pipeline)), default=0)
    state = [
        0 if t.pipeline is None or not t.pipeline.steps else experts * (_STATE + 8 * (t.stop - t.start)) for t in tasks
    ]
    return max(task.peak for task in tasks) + held + sum(sorted(state)[:-1])


def _obstacles(out: Path, plans: Mapping[str, Plan]) -> list[str]:
    """What speaks against all variants together."""
    out = absolute(out)
    if (out / MANIFEST).exists() or (out / "config.json").exists():
        return [f"{out} is a model; the variants need a folder of their own to stand in"]
    need = sum(plan.write_bytes for plan in plans.values())
    with writing(out):
        ground = next(folder for folder in (out, *out.parents) if folder.exists())
        begun = [work for name in plans if (work := out / f"{name}.partial").exists()]
        free = system.call(shutil.disk_usage, ground).free + sum(map(allocated, begun))
    if need <= free:
        return []
    return [
        f"{len(plans)} variants need {gigabytes(need)} in {out}, but {gigabytes(free)} are free on its disk; "
        "free some space or sweep over fewer values"
    ]
