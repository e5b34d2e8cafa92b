"""From a recipe to a finished folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.method import Codec, registry
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.jobs.job import Job, Result
from weightsmith.jobs.package import package
from weightsmith.jobs.sample import foretold
from weightsmith.plan.plan import Plan
from weightsmith.recipe.schema import Recipe

__all__ = ["merge_job", "preview", "run"]


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
