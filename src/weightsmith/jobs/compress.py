"""Several experts into one compressed folder, and models back out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import NotKept, PlanError, RecipeError
from weightsmith.core.problem import Code, Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.task import Task
from weightsmith.engine.lost import added, errors
from weightsmith.inputs.opened import Inputs
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.io.read.codec_folder import WEIGHTS, CodecFolder, CodecSource, ConsensusSource, describe
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.write.output import check_output
from weightsmith.jobs.job import Job, Records, Result, Storage
from weightsmith.jobs.merge import run
from weightsmith.jobs.package import treatments
from weightsmith.recipe.schema import ModelRef, Recipe

__all__ = ["compress", "noted", "restore", "stored"]


def compress(
    recipe: Recipe,
    out: Path,
    settings: Settings = DEFAULT,
    *,
    sources: Inputs | None = None,
    accept_loss: bool = False,
    **options: Any,
) -> Result:
    """Write the experts of a recipe whose method ends in a codec (`tall_masks`) into the folder `out`.

    Without a base (where the codec needs none: `fwsvd`) one model is compressed, and the folder is all that is needed.
    Tensors that `exclude` or a rule keeps stay in the base.  Tensors that only experts have are stored whole for
    each of them, if excluded.  The folder appears complete or not at all; options change single settings.

    `Result.storage` says what is saved, and what of each expert's change is lost.

    Raises PlanError with every problem before anything is written, no space saved among them; and, with nothing left of
    what was, where an expert would come back further from itself than the bare base is.  With `accept_loss` neither of
    the two is a problem.
    """
    settings = settings.but(**options)
    packager = partial(_package, accept_loss=accept_loss)
    job = Job.planned(recipe, settings, packager, out=out, sources=sources, encode=True, weights=WEIGHTS)
    idle = [] if job.plan.problems else _saves_nothing(stored(job, {}))
    if idle and not accept_loss:
        raise PlanError(idle)
    made = job.run(out, settings)
    storage = stored(job, read_manifest(made.out)["codec"])
    return replace(made, storage=storage, warnings=(*made.warnings, *idle))


def restore(
    folder: Path,
    expert: str | None,
    out: Path,
    settings: Settings = DEFAULT,
    *,
    base: str | Path | Source | None = None,
    consensus: int | None = None,
    scale: float = 1.0,
    dtype: str | None = None,
    **options: Any,
) -> Result:
    """Write one model of a compressed folder into the folder `out`; the experts are not needed, the base is.

    expert     which one; None with `consensus`
    base       where the base is now, if not where it was; a model with other weights is refused
    consensus  instead of an expert, their merge: base + scale * tau where at least this many masks agree
    dtype      of the result's floating tensors; default: as the base stores them

    Raises SourceError or PlanError before anything is written; options change single settings.
    """
    settings = settings.but(**options)
    if (expert is None) == (consensus is None):
        names = CodecFolder(Path(folder), open_source).experts
        raise RecipeError(
            f"restore needs the name of an expert ({', '.join(names)}), or a number for consensus, and not both: "
            f"--expert {names[0]}, or --consensus 2"
        )
    if consensus is None and scale != 1:
        raise RecipeError(f"scale = {scale:g} is for a consensus only; an expert is rebuilt at scale 1")
    there = [] if settings.resume and (out / MANIFEST).is_file() else (  # it may be complete; `run` will see
        check_output(out, [folder], settings.overwrite, settings.resume, 0))  # fmt: skip
    if there:  # before a download
        raise PlanError(there)
    opened = CodecFolder(Path(folder), open_source)
    name = opened.check_expert(expert) if consensus is None else "consensus"
    origin = opened.base(None if base is None else open_source(base), strict=True)
    source: Source
    if consensus is None:
        source = CodecSource(opened, origin, name)
    else:
        source = ConsensusSource(opened, origin, consensus, scale)
    origin.prepare()
    opened.refuse_other(origin)
    reference = ModelRef(model=str(folder), expert=expert)
    recipe = Recipe(models={name: reference}, method="keep", output={"dtype": dtype})  # type: ignore[arg-type]
    inputs = Inputs(None, {name: source})
    made = run(recipe, out, settings, sources=inputs)
    return replace(made, lost=read_manifest(Path(folder))["codec"].get("error", {}).get(expert))


def _package(job: Job, records: Records, folder: Path, accept_loss: bool) -> None:
    """Write weightsmith.json.  The base's companion files stay with the base; those of one model alone go along."""
    (_, reference), *_ = job.inputs.models
    if job.inputs.base is None and reference.origin.folder is not None:
        copy_companions(reference.origin.folder, folder, reference.origin.files)
    about = noted(job, records)
    if not accept_loss:
        _refuse_worse_than_nothing(job.plan.tasks, about["error"])
    more = {"seed": job.plan.recipe.seed, "codec": about, "device": job.plan.device or None}
    job.manifest(folder, records, "codec", treatments(job.plan), **more)


def noted(job: Job, records: Records) -> dict[str, Any]:
    """What weightsmith.json says under 'codec': how to read the folder, and what of each expert is lost."""
    plan, inputs = job.plan, job.inputs
    (_, reference), *_ = inputs.models
    encoded = {task.key.name: codec for task in plan.tasks if task.pipeline and (codec := task.pipeline.codec)}
    about = describe(reference, _path(plan.recipe.base), inputs.experts, encoded, alone=inputs.base is None)
    found: dict[str, list[Any]] = {}
    for task in plan.tasks:
        if lost := records[task.id].get("lost"):
            found.setdefault(task.key.name, []).append(lost)
    about["error"], about["errors"] = errors({name: added(pieces) for name, pieces in found.items()})
    return about


def _saves_nothing(storage: Storage) -> list[Problem]:
    """The problem that the models in full take no more than the base and the result."""
    if storage.base + storage.stored < storage.experts:
        return []
    text = (
        f"no space is saved: base and result take {storage.ratio:.0%} of what the models take in full, which lose "
        "nothing; keep those, compress more models of this base together, or take a codec with few bits for each model "
        "(bitdelta); or pass --accept-loss (Python: accept_loss=True) to see what it does"
    )
    return [Problem(Code.CODEC, "method", text)]


def _refuse_worse_than_nothing(tasks: Iterable[Task], error: Mapping[str, float]) -> None:
    """NotKept where an expert would come back further from itself than the base is."""
    worse = [f"{lost:.1%} of {name}'s" for name, lost in error.items() if lost > 1]
    if worse:
        codecs = dict.fromkeys(task.pipeline.codec for task in tasks if task.pipeline is not None)
        advice = dict.fromkeys(text for codec in codecs if codec is not None and (text := codec.advice()))
        raise NotKept(
            f"nothing is kept: storing nothing (the bare base) loses 100% of a model's change, but here would be lost: "
            f"{', '.join(worse)}; {'; or '.join([*advice, _OTHERS])}"
        )


_OTHERS = (
    "take another codec (exact loses nothing, bitdelta never more than storing nothing); or make one model of "
    "all with the filter consensus; or pass --accept-loss (Python: accept_loss=True) if only your own scores count"
)


def _path(ref: ModelRef | None) -> str:
    """Where the base is found again: an absolute path, a hub id, or '' for what is neither."""
    if ref is None or not isinstance(ref.model, str) or ref.layers is not None or ref.expert is not None:
        return ""
    place = Path(ref.model).expanduser()
    return str(place.resolve()) if place.exists() else ref.model


def stored(job: Job, noted: Mapping[str, Any]) -> Storage:
    """Of a finished job, with what weightsmith.json notes under `codec`."""
    found = [(expert, name, error) for name, own in noted.get("errors", {}).items() for expert, error in own.items()]
    size = {name: sum(key.nbytes for key in source.keys.values()) for name, source in job.inputs.models}
    return Storage(
        base=size.pop("base", 0),
        stored=job.plan.write_bytes,
        experts=sum(size.values()),
        count=len(job.inputs.experts),
        error=noted.get("error", {}),
        worst={expert: (name, error) for expert, name, error in sorted(found, key=lambda one: one[2])},
    )
