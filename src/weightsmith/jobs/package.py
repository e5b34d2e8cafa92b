"""What goes with the weights of a merge: companion files, model card, weightsmith.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from weightsmith import __version__
from weightsmith.inputs.vocabulary import chat_template, modules_beside, tokenizer_folder
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, Citation, about, model_card
from weightsmith.io.package.companions import Copied, copy_companions
from weightsmith.io.package.template import write_template
from weightsmith.io.read.source import Origin, Source
from weightsmith.jobs.job import Job, Records
from weightsmith.plan.lengths import lengths
from weightsmith.plan.plan import Plan
from weightsmith.recipe.schema import ModelRef, Modules, Slices

__all__ = ["companions", "package", "treatments"]


def companions(job: Job, folder: Path) -> Copied:
    """Write what a program needs beside the weights to load them: config, tokenizer, chat template."""
    recipe = job.plan.recipe
    reference = job.inputs.models[0][1]
    copied, origin = Copied(), reference.origin
    if origin.folder is not None:
        changed = recipe.output.dtype if _dtype(reference) != recipe.output.dtype else None
        copied = copy_companions(
            origin.folder,
            folder,
            origin.files,
            dtype=changed,
            config=origin.config,
            tokenizer=tokenizer_folder(recipe, job.inputs),
            modules=modules_beside(job.inputs)[0],
        )
    template = chat_template(recipe, job.inputs)
    if origin.folder is not None and origin.numbering is not None:
        origin.numbering.write(folder)  # only files that were copied just now
    if template is not None:
        write_template(folder, template)
    return copied


def package(job: Job, records: Records, folder: Path) -> None:
    """Write what goes with the weights into their folder."""
    plan, recipe, copied = job.plan, job.plan.recipe, companions(job, folder)
    origin = job.inputs.models[0][1].origin
    parts = {name: source.origin.parts(name) for name, source in job.inputs.experts.items()}
    joined = [name for name, ref in recipe.models.items() if isinstance(ref.model, (Slices, Modules))]
    card = model_card(
        title=folder.name if folder.name != "files" else "Merged model",
        models=[card for name, ref in recipe.models.items() for card in _rows(name, ref, parts[name])],
        base=CardModel("base", _hub_id(recipe.base)) if recipe.base is not None else None,
        method=_in_words(plan),
        recipe=job.recipe,
        licences=job.licences(),
        citations=_citations(plan),
        about=about(origin.folder, folder),
        merged=len(recipe.models),
        stacked=len({origin.place for name in joined for origin in parts[name].values()}),
        version=__version__,
    )
    notes = {stage: note for record in records.values() for stage, note in record.get("notes", {}).items()}
    write_file(folder / "README.md", card)
    job.manifest(
        folder,
        records,
        "merge",
        treatments(plan),
        companions={"files": copied.files, "modules": copied.modules, "left": copied.left},
        seed=recipe.seed,
        notes=notes or None,
        scales=_scales(plan, records) or None,
        lengths={one.pipeline.name: float(f"{one.times:.3g}") for one in lengths(plan.tasks, records)} or None,
        device=plan.device or None,
    )


def _scales(plan: Plan, records: Records) -> dict[str, dict[str, float]]:
    """Stage whose factor is auto -> tensor -> the factor that was found."""
    out: dict[str, dict[str, float]] = {}
    for task in plan.tasks:
        for what, figure in records[task.id].get("told", {}).items():
            if what.startswith("auto."):
                out.setdefault(what.removeprefix("auto."), {})[task.key.name] = figure
    return out


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


def _rows(name: str, ref: ModelRef, parts: Mapping[str, Origin]) -> Iterable[CardModel]:
    """A model's rows of the table: its own, or one for each model that it is put together or merged of."""
    if name in parts:
        return [CardModel(name, _hub_id(ref), ref.parameters)]
    return [CardModel(called, _hub_id(ModelRef(model=origin.place))) for called, origin in parts.items()]


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
