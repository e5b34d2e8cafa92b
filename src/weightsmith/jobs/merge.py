"""From a recipe to a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.method import Codec, registry
from weightsmith.core.problem import Code, Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.jobs.job import Job, Result
from weightsmith.jobs.package import package
from weightsmith.jobs.sample import foretold
from weightsmith.plan.plan import Plan
from weightsmith.recipe.load import skeleton
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.sweep import expand

__all__ = ["also_wrong", "merge_job", "preview", "run"]


def run(
    recipe: Recipe, out: Path, settings: Settings = DEFAULT, *, sources: Inputs | None = None, **options: Any
) -> Result:
    """Merge into the folder `out`, which appears complete or not at all; or to a URL, see `io.write.upload`.

    options  single fields of the settings, by name (memory, threads, device, resume, ...)

    Raises PlanError with every problem before anything is written.
    """
    settings = settings.but(**options)
    return merge_job(recipe, settings, out, sources).run(out, settings)


def merge_job(recipe: Recipe, settings: Settings, out: Path | None, sources: Inputs | None = None) -> Job:
    """The job of a merge, from headers alone; its plan holds every problem."""
    return Job.planned(recipe, settings, package, out=out, sources=sources)


def also_wrong(path: Path, assignments: Sequence[str]) -> list[Problem]:
    """What is wrong with the models and selectors of a recipe that has other faults, so that all come out at once."""
    try:
        found = skeleton(path, next(iter(expand(assignments).values())))
        job = None if found is None else Job.planned(found, DEFAULT, package)
    except WeightsmithError:
        return []
    wanted = () if job is None else (Code.UNMATCHED, Code.INPUT)
    return [problem for problem in (job.plan.problems if job is not None else ()) if problem.code in wanted]


def preview(recipe: Recipe, out: Path | None = None, settings: Settings = DEFAULT, **options: Any) -> Plan:
    """Plan a merge, or a compression where the method ends in a codec, with every problem, those of `out` too.

    out  default: a folder that is not there yet, in the working directory

    Beside headers a few rows of models that lie here are read, and merged: see `jobs.sample`.
    """
    settings = settings.but(**options)
    encode = any(issubclass(registry(stage.name), Codec) for stage in recipe.method)
    job = Job.planned(recipe, settings, package, out=out or Path.cwd(), encode=encode)
    there = [] if out is None else job.obstacles(out, settings)
    here = not any(source.origin.cost.download for _, source in job.inputs.models)
    result, said = foretold(job.plan, job.inputs) if here and not job.plan.problems else ({}, ())
    problems, warnings = tuple(dict.fromkeys((*job.plan.problems, *there))), (*job.plan.warnings, *said)
    return replace(job.plan, problems=problems, warnings=warnings, result={**job.plan.result, **result})
