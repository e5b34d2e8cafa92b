"""Several experts into one compressed folder, and models back out of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.carry import carry_out
from weightsmith.engine.lost import Squares, errors
from weightsmith.inputs.opened import Inputs
from weightsmith.io.package.card import licences
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.package.manifest import MANIFEST, build_manifest, write_manifest
from weightsmith.io.read.codec_folder import WEIGHTS, CodecFolder, CodecSource, ConsensusSource, describe
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.write.output import check_output
from weightsmith.jobs.merge import Result, Storage, finished, prepared, result_of, run, treatments, with_fingerprints
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.plan.remarks import what_models_say, what_was_found
from weightsmith.recipe.schema import ModelRef, Recipe

__all__ = ["compress", "restore"]


def compress(
    recipe: Recipe, out: Path, settings: Settings = DEFAULT, *, sources: Inputs | None = None, **options: Any
) -> Result:
    """Write the experts of a recipe whose method ends in a codec (`tall_masks`) into the folder `out`.

    Without a base (where the codec needs none: `fwsvd`) one model is compressed, and the folder is all that is needed.
    Tensors that `exclude` or a rule keeps stay in the base.  Tensors that only experts have are stored whole for
    each of them, if excluded.  The folder appears complete or not at all; options change single settings.

    Raises PlanError with every problem before anything is written.  `Result.storage` says what it saves.
    """
    began = time.perf_counter()
    settings = settings.but(**options)
    inputs = with_fingerprints(sources if sources is not None else open_inputs(recipe), settings)
    plan = make_plan(recipe, settings, sources=inputs, out=out, strict=False, encode=True)
    records: Mapping[str, Any] = {}
    said = list(plan.notes)
    if not (settings.resume and finished(plan, inputs, out)):
        sink = prepared(plan, inputs, out, settings, weight_name=WEIGHTS)
        said += what_models_say(plan.tasks, inputs, sink.identity["inputs"])
        records = carry_out(plan, inputs, sink, progress=settings.progress)
        sink.finish(partial(_package, plan=plan, inputs=inputs, records=records))
        said += what_was_found(plan.tasks, records, list(inputs.experts))
    return result_of(plan, out, time.perf_counter() - began, said, _storage(plan, inputs, records))


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
        raise RecipeError("restore needs the name of an expert, or a number for consensus, and not both")
    if consensus is None and scale != 1:
        raise RecipeError(f"scale = {scale:g} is for a consensus only; an expert is rebuilt at scale 1")
    complete = settings.resume and (out / MANIFEST).is_file()  # it may be; `run` will see
    if not complete and (
        problems := check_output(out, [folder], settings.overwrite, settings.resume, 0)
    ):  # before a download
        raise PlanError(problems)
    opened = CodecFolder(Path(folder))
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
    return run(recipe, out, settings, sources=inputs)


def _package(folder: Path, plan: Plan, inputs: Inputs, records: Mapping[str, Any]) -> Iterable[Path]:
    """Write weightsmith.json.  The base's companion files stay with the base; those of one model alone go along."""
    (_, reference), *_ = inputs.models
    written: list[Path] = []
    if inputs.base is None and reference.origin.folder is not None:
        copied = copy_companions(reference.origin.folder, folder, reference.origin.files)
        written = [folder / name for name in copied.files]
    encoded = {task.key.name: codec for task in plan.tasks if task.pipeline and (codec := task.pipeline.codec)}
    manifest = build_manifest(
        folder,
        recipe=plan.recipe.model_dump(mode="json", exclude_defaults=True),
        inputs=inputs.fingerprints(),
        keys=plan.keys,
        records=records.values(),
        made_by=treatments(plan),
        licences=licences({name: source.origin.folder for name, source in inputs.models}),
        kind="codec",
    )
    about = describe(reference, _path(plan.recipe.base), inputs.experts, encoded, alone=inputs.base is None)
    if lost := _lost(plan, records):
        about["error"], about["errors"] = errors(lost)
    more = {"device": plan.device} if plan.device else {}
    return [*written, write_manifest(folder, {**manifest, "seed": plan.recipe.seed, "codec": about, **more})]


def _path(ref: ModelRef | None) -> str:
    """Where the base is found again: an absolute path, a hub id, or '' for what is neither."""
    if ref is None or not isinstance(ref.model, str) or ref.layers is not None or ref.expert is not None:
        return ""
    place = Path(ref.model).expanduser()
    return str(place.resolve()) if place.exists() else ref.model


def _lost(plan: Plan, records: Mapping[str, Any]) -> dict[str, Squares]:
    """Tensor -> what was lost of it, where that was measured."""
    return {task.key.name: lost for task in plan.tasks if (lost := records.get(task.id, {}).get("lost"))}


def _storage(plan: Plan, inputs: Inputs, records: Mapping[str, Any]) -> Storage:
    total, each = errors(_lost(plan, records))
    found = [(name, expert, error) for name, own in each.items() for expert, error in own.items()]
    size = {name: sum(key.nbytes for key in source.keys.values()) for name, source in inputs.models}
    return Storage(
        base=size.pop("base", 0),
        stored=plan.write_bytes,
        experts=sum(size.values()),
        count=len(inputs.experts),
        error=total,
        worst=max(found, key=lambda one: one[2], default=None),
    )
