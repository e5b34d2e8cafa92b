"""Does a recipe still give the bytes that a folder holds?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import OutputError, PlanError, WeightsmithError, problems_of
from weightsmith.core.keys import Key
from weightsmith.core.problem import Code
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.carry import carry_out
from weightsmith.io.package.manifest import merge_parts, read_manifest
from weightsmith.io.url import Url
from weightsmith.io.write.sink import Sink
from weightsmith.jobs.job import Job
from weightsmith.jobs.nested import open_inputs
from weightsmith.jobs.package import package
from weightsmith.jobs.transplant import inputs_of
from weightsmith.recipe.schema import Recipe

__all__ = ["differences", "lasting", "rerun"]


class _Nowhere(Sink):
    """Takes the blocks of a run that is made for its checksums alone."""

    def begin(self, keys: Sequence[Key]) -> None:
        """Nothing to lay out."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Nothing to keep."""


def lasting(fingerprint: Any) -> Any:
    """A fingerprint without the times, which a copy on another machine does not keep: the bytes are compared below."""
    if isinstance(fingerprint, dict):
        return {name: lasting(value) for name, value in fingerprint.items() if name != "mtime_ns"}
    return fingerprint


def _which(before: Any, now: Any) -> str:
    """' (file, file)': the files whose contents are others, where they were noted."""
    noted, found = ((part or {}).get("contents", {}) for part in (before, now))
    changed = sorted(name for name in {**noted, **found} if noted.get(name) != found.get(name))
    return f" ({', '.join(changed)})" if changed else ""


def rerun(out: Path | Url, settings: Settings = DEFAULT) -> list[str]:
    """Carry out the recipe in `out`/weightsmith.json again, without writing, and compare checksums.

    Returns what differs, a line each: inputs that have changed or are gone, tensors that come out otherwise.
    """
    manifest = read_manifest(out)
    if manifest["kind"] == "adapter":
        raise OutputError(f"{out} was made by weightsmith lora; run that again into another folder to compare")
    if manifest["kind"] == "basis":
        raise OutputError(f"{out} was made by weightsmith align --bases; run that again into another folder to compare")
    if manifest["kind"] in ("lock", "unlock"):
        raise OutputError(f"{out} was made with a key; run weightsmith {manifest['kind']} again to compare")
    try:
        recipe = Recipe.model_validate_json(json.dumps(manifest["recipe"]))
        full = any("contents" in noted for noted in manifest["inputs"].values())
        made = inputs_of(recipe, manifest["inputs"].get("model"))
        inputs = replace(made if made is not None else open_inputs(recipe), partial=True)
        settings = settings.but(device=manifest.get("device", "cpu"), fingerprint="full" if full else "quick")
        job = Job.planned(recipe, settings, package, sources=inputs, encode=manifest["kind"] == "codec")
        if job.plan.problems:
            raise PlanError(job.plan.problems)
    except WeightsmithError as error:
        found = problems_of(error)
        # The way out first: what follows may list every method there is.
        unknown = any(problem.code is Code.UNKNOWN for problem in found)
        hint = " before the file that its method comes from is named (--plugin FILE)" if unknown else ""
        return [f"the recipe cannot be run again{hint}: {problem}" for problem in found]
    except ValueError as error:
        raise OutputError(f"{out}: the recipe in weightsmith.json is not one of this version ({error})") from error
    return differences(job, out, manifest, settings)


def differences(job: Job, out: Path | Url, manifest: Mapping[str, Any], settings: Settings = DEFAULT) -> list[str]:
    """Carry out a job without writing; return what differs from a manifest in inputs and tensors, a line each."""
    noted = manifest["output"]["tensors"]
    noted_inputs = lasting(manifest["inputs"])
    problems = [
        f"input {name} is not what it was when {out.name} was made{_which(noted_inputs.get(name), found)}"
        for name, found in lasting(json.loads(json.dumps(job.identify()))).items()
        if noted_inputs.get(name) != found
    ]
    job.prepare()
    records = carry_out(job.plan, job.inputs, _Nowhere(), progress=settings.progress)
    parts = merge_parts(records.values(), job.plan.keys)
    problems += [f"{name} is no longer made by the recipe" for name in noted if name not in parts]
    for name, found in parts.items():
        if name not in noted:
            problems.append(f"{name} is made by the recipe, but is not in {out.name}")
        elif [list(part) for part in found] != [list(part) for part in noted[name]["parts"]]:
            problems.append(f"{name} comes out with other bytes")
    return problems
