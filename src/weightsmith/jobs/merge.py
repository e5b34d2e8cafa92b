"""From a recipe to a finished folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.core.errors import OutputError, PlanError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.units import parse_size
from weightsmith.engine.carry import carry_out
from weightsmith.engine.cluster import ray_runner
from weightsmith.inputs.opened import Inputs
from weightsmith.inputs.vocabulary import chat_template, tokenizer_folder
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, Citation, licence_problems, licences, model_card
from weightsmith.io.package.companions import Copied, copy_companions
from weightsmith.io.package.manifest import MANIFEST, build_manifest, read_manifest, write_manifest
from weightsmith.io.package.template import write_template
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url, destination, without_secrets
from weightsmith.io.write.output import FolderSink, check_output, tidy
from weightsmith.io.write.staging import AT_ONCE
from weightsmith.io.write.upload import UrlSink, clear_marks
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.plan.remarks import what_models_say, what_was_found
from weightsmith.recipe.schema import ModelRef, Recipe

__all__ = [
    "Result",
    "Storage",
    "finished",
    "folder_sink",
    "identity",
    "licence_warnings",
    "package",
    "prepared",
    "reads",
    "result_of",
    "run",
    "treatments",
    "with_fingerprints",
]


@dataclass(frozen=True)
class Storage:
    """Bytes of tensors: the compressed folder and the base that it needs, against the experts in full.

    error   expert -> relative Frobenius error of its change (of its weights, where there is no base), over all tensors
            stored by codecs of whole tensors
    worst   (tensor, expert, error) of the largest one; None if nothing was measured
    """

    base: int
    stored: int
    experts: int
    count: int
    error: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[str, str, float] | None = None

    @property
    def ratio(self) -> float:
        """What is kept, base included, as a share of the full experts."""
        return (self.base + self.stored) / max(self.experts, 1)


@dataclass(frozen=True)
class Result:
    """What a run did.  `warnings` are things the user should look at, a line each; `storage` is of a compression."""

    out: Path | Url
    seconds: float
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    warnings: tuple[str, ...] = ()
    storage: Storage | None = None


def run(
    recipe: Recipe, out: Path, settings: Settings = DEFAULT, *, sources: Inputs | None = None, **options: Any
) -> Result:
    """Merge into the folder `out`, which appears complete or not at all; or to a URL, see `io.write.upload`.

    options  single fields of the settings, by name (memory, threads, device, resume, ...)

    Raises PlanError with every problem before anything is written.
    """
    began = time.perf_counter()
    settings = settings.but(**options)
    inputs = with_fingerprints(sources if sources is not None else open_inputs(recipe), settings)
    plan = make_plan(recipe, settings, sources=inputs, out=out, strict=False)
    said = list(plan.notes)
    if not (settings.resume and finished(plan, inputs, out)):
        sink = prepared(plan, inputs, out, settings)
        said += what_models_say(plan.tasks, inputs, sink.identity["inputs"])
        with ray_runner(settings.ray, cpus=plan.threads, memory=plan.task_bytes) as runner:
            records = carry_out(plan, inputs, sink, progress=settings.progress, runner=runner)
        sink.finish(partial(package, plan=plan, inputs=inputs, records=records))
        said += what_was_found(plan.tasks, records, list(inputs.experts))
    said += licence_warnings(dict(inputs.models))
    return result_of(plan, out, time.perf_counter() - began, said)


def with_fingerprints(inputs: Inputs, settings: Settings) -> Inputs:
    """Inputs whose fingerprints are of the kind that is asked for."""
    return replace(inputs, full=settings.fingerprint == "full")


def result_of(
    plan: Plan, out: Path, seconds: float, warnings: Iterable[str] = (), storage: Storage | None = None
) -> Result:
    """What there is to say about a finished run of a plan."""
    return Result(
        out=destination(out),
        seconds=seconds,
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        peak_bytes=plan.peak_bytes,
        warnings=tuple(warnings),
        storage=storage,
    )


def licence_warnings(sources: Mapping[str, Source]) -> list[str]:
    """What a publisher should look at; nothing where no input states a licence at all."""
    stated = licences({name: source.origin.folder for name, source in sources.items()})
    return licence_problems(stated) if set(stated.values()) != {"unknown"} else []


def prepared(
    plan: Plan,
    inputs: Inputs,
    out: Path,
    settings: Settings,
    *,
    weight_name: str = "model",
    known: Mapping[str, Any] | None = None,
) -> FolderSink | UrlSink:
    """The sink for a plan, after everything that can be wrong was looked at and what is missing here was fetched.

    `known` is the run's identity where the plan's recipe is not what the user wrote.
    """
    read = (*reads(plan.recipe, inputs), *settings.files)
    here = min(plan.write_bytes, AT_ONCE * parse_size(plan.recipe.output.shard_size))
    problems = [*plan.problems, *check_output(
        out, read, settings.overwrite, settings.resume, plan.write_bytes, local_bytes=here
    )]  # fmt: skip
    if problems:
        raise PlanError(problems)
    for _, source in inputs.models:
        source.prepare()
    return folder_sink(plan, inputs, out, settings, weight_name=weight_name, known=known)


def folder_sink(
    plan: Plan,
    inputs: Inputs,
    out: Path,
    settings: Settings,
    *,
    weight_name: str = "model",
    known: Mapping[str, Any] | None = None,
) -> FolderSink | UrlSink:
    """The sink for a plan that nothing speaks against; `known`: see `prepared`."""
    place = destination(out)
    options: dict[str, Any] = {
        "shard_size": parse_size(plan.recipe.output.shard_size),
        "identity": known or identity(plan.recipe, inputs, plan.device),
        "resume": settings.resume,
        "overwrite": settings.overwrite,
        "weight_name": weight_name,
        "metadata": {"format": "pt", **_tied(plan, inputs)},
    }
    return UrlSink(place, **options) if isinstance(place, Url) else FolderSink(place, **options)


def _tied(plan: Plan, inputs: Inputs) -> dict[str, str]:
    """Tied name -> the name that is written, as `safetensors.torch.save_model` notes them."""
    written = {key.name for key in plan.keys}
    return {alias: name for alias, name in inputs.models[0][1].aliases.items() if name in written}


def finished(plan: Plan, inputs: Inputs, out: Path, known: Mapping[str, Any] | None = None) -> bool:
    """Whether `out` is what this plan makes: the run to resume got through.  Tidies up after it."""
    place = destination(out)
    if plan.problems or not (isinstance(place, Url) or (place / MANIFEST).is_file()):
        return False
    try:
        made = read_manifest(place)
    except OutputError:
        return False
    wanted = json.loads(json.dumps(known or identity(plan.recipe, inputs, plan.device)))
    noted = {"recipe": made["recipe"], "inputs": made["inputs"], "version": made["weightsmith"]}
    noted |= {"device": made["device"]} if "device" in made else {}
    if json.dumps(noted) != json.dumps(wanted):  # as texts: the order of the models counts
        return False
    if isinstance(place, Url):
        clear_marks(place)
    else:
        tidy(place)
    return True


def identity(recipe: Recipe, inputs: Inputs, device: str = "") -> dict[str, Any]:
    """What the output's bytes depend on: a run is resumed, and can be repeated, under the same identity only."""
    return {
        "recipe": without_secrets(recipe.model_dump(mode="json", exclude_defaults=True)),
        "inputs": inputs.fingerprints(),
        "version": __version__,
        **({"device": device} if device else {}),
    }


def package(
    folder: Path, plan: Plan, inputs: Inputs, records: Mapping[str, Any], kind: str = "merge"
) -> Iterable[Path]:
    """Write what goes with the weights: companion files, model card, weightsmith.json.  Returns their paths."""
    recipe = plan.recipe
    reference = inputs.models[0][1]
    copied, origin = Copied(), reference.origin
    if origin.folder is not None:
        changed = recipe.output.dtype if _dtype(reference) != recipe.output.dtype else None
        copied = copy_companions(
            origin.folder,
            folder,
            origin.files,
            dtype=changed,
            config=origin.config,
            tokenizer=tokenizer_folder(recipe, inputs),
        )
    template = chat_template(recipe, inputs)
    if origin.folder is not None and origin.numbering is not None:
        origin.numbering.write(folder)  # only files that were copied just now
    written = write_template(folder, template) if template is not None else []
    stated = licences({name: source.origin.folder for name, source in inputs.models})
    shown = recipe.model_dump(mode="json", exclude_defaults=True)
    card = model_card(
        title=folder.name if folder.name != "files" else "Merged model",
        models=[CardModel(name, _hub_id(ref), ref.parameters) for name, ref in recipe.models.items()],
        base=CardModel("base", _hub_id(recipe.base)) if recipe.base is not None else None,
        method=_in_words(plan),
        recipe=shown,
        licences=stated,
        citations=_citations(plan),
        library_name="transformers" if (folder / "config.json").exists() else "pytorch",
        version=__version__,
    )
    paths = [*(folder / name for name in copied.files), *written]
    paths.append(write_file(folder / "README.md", card))
    manifest = build_manifest(
        folder,
        recipe=shown,
        inputs=inputs.fingerprints(),
        keys=plan.keys,
        records=records.values(),
        made_by=treatments(plan),
        licences=stated,
        companions={"files": copied.files, "modules": copied.modules, "left": copied.left},
        kind=kind,
    )
    notes = {stage: note for record in records.values() for stage, note in record.get("notes", {}).items()}
    more = {"notes": notes, "device": plan.device}
    paths.append(write_manifest(folder, {**manifest, "seed": recipe.seed, **{k: v for k, v in more.items() if v}}))
    return paths


def treatments(plan: Plan) -> dict[str, str]:
    """Tensor -> how it was made, with every parameter: 'ties(density=0.2, ...)', 'copied from base (...)'."""
    out: dict[str, str] = {}
    for task in plan.tasks:
        for key in task.keys:
            if task.pipeline is None:
                out[key.name] = f"copied from {task.source or 'base'} ({task.reason})"
            else:
                out[key.name] = " | ".join(stage.describe() for stage in task.pipeline.stages)
    return out


def _in_words(plan: Plan) -> str:
    lines = [f"- {c.description}: {c.tensors} tensors, {c.parameters:,} parameters" for c in plan.coverage]
    stages = {type(s): s for t in plan.tasks if t.pipeline for s in t.pipeline.stages}
    words = [f"**{cls.traits.name}**: {(cls.__doc__ or '').strip().splitlines()[0]}" for cls in stages]
    return "\n\n".join(words) + "\n\n" + "\n".join(lines)


def _citations(plan: Plan) -> list[Citation]:
    stages = {type(s) for t in plan.tasks if t.pipeline for s in t.pipeline.stages}
    return [Citation(cls.traits.name, cls.traits.paper) for cls in sorted(stages, key=lambda c: c.traits.name)
            if cls.traits.paper]  # fmt: skip


def _dtype(source: Source) -> str | None:
    kinds = {key.dtype for key in source.keys.values() if key.floating}
    return kinds.pop() if len(kinds) == 1 else None


def _hub_id(ref: ModelRef | None) -> str | None:
    """The hub id without its revision, or None for anything that is or looks like a local path."""
    if ref is None or not isinstance(ref.model, str):
        return None
    name = ref.model.split("@")[0]
    local = Path(ref.model).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    return None if local else name


def reads(recipe: Recipe, inputs: Inputs) -> tuple[Path, ...]:
    """Every folder and file that a run reads: nothing may be written over them."""
    tokenizer = tokenizer_folder(recipe, inputs)
    return inputs.locations() if tokenizer is None else (*inputs.locations(), tokenizer)
