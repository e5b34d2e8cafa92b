"""Carrying out a lock: the job, the comparison of outputs, and what goes with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.align.agree import Agreement, agreement
from weightsmith.align.bases import Attention, Bases
from weightsmith.core.errors import NotKept, some
from weightsmith.core.settings import Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, about, model_card
from weightsmith.io.package.companions import Copied, copy_companions
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.experts import stored_as
from weightsmith.io.read.source import Source
from weightsmith.jobs.job import Job, Records, Result
from weightsmith.protect.key import Key
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

__all__ = ["Locked", "Work", "left_of", "written"]

NOT_PROTECTED = (
    "A lock keeps the model's function and takes its weights out of the basis of its base, so that merging it naively "
    "fails.  It is no protection against somebody who looks: with the base at hand the change of basis can be "
    "estimated by least squares.  `weightsmith audit MODEL --base BASE` runs that attack and says what is left."
)


@dataclass(frozen=True)
class Locked:
    """What `lock` or `unlock` did.

    result     of the run that wrote the folder;  key: hash of the key;  new_key: whether its file was written now
    agreement  of outputs; None: they were not compared, as was asked for
    left       module: part -> why it stays as it is, or is weak
    """

    result: Result
    key: str
    agreement: Agreement | None
    left: Mapping[str, str]
    new_key: bool = False


@dataclass(frozen=True)
class Work:
    """One lock to carry out: `verb` lock or unlock, the model, and the view of it that is written.

    names  of the tensors that are changed
    """

    verb: str
    source: Source
    view: Source
    key: Key
    found: Bases
    names: tuple[str, ...]
    compare: bool

    @property
    def told(self) -> dict[str, Any]:
        """What the card and the manifest say of it: of the key its hash."""
        key = self.key
        return {"key": key.hash, "parts": list(key.parts), "condition": key.condition, "modules": list(key.modules)}


def written(work: Work, out: Path, settings: Settings) -> Locked:
    """Write the folder `out`, which appears complete or not at all; NotKept where outputs moved."""
    source, verb, seen = work.source, work.verb, list[Agreement]()
    where = {"model": str(source.origin.folder.resolve() if source.origin.folder else source)}
    recipe = Recipe(models={"model": ModelRef(model=str(source))}, method=(StageSpec(name="keep"),))
    inputs = Inputs(None, {"model": work.view})
    job = Job.planned(recipe, settings, partial(_package, work, seen), out=out, sources=inputs)
    result = replace(job, recipe={"models": {"model": where}, verb: work.told}).run(out, settings)
    if result.complete and (noted := read_manifest(out).get(verb, {}).get("logits")):
        seen.append(Agreement.read(noted))
    return Locked(result, work.key.hash, seen[0] if seen else None, left_of(work.key, work.found))


def left_of(key: Key, found: Bases) -> dict[str, str]:
    """Module: part -> why it stays as it is."""
    out: dict[str, str] = {}
    for one in found.all:
        for what, why in key.known.left.get(key.known.kind(one), {}).items():
            asked = {"heads": "heads", "queries and keys": "qk"}.get(what, "mlp")
            if asked in key.parts:
                out[f"{one.module}: {what}"] = why
        weak = isinstance(one, Attention) and "qk" in key.parts and any(branch.normed for branch in one.qk)
        if weak and f"{one.module}: queries and keys" not in out:
            out[f"{one.module}: queries and keys"] = "weak: a norm behind them lets only signs and gains through"
    return out


def _package(work: Work, seen: list[Agreement], job: Job, records: Records, folder: Path) -> None:
    """Companion files, the comparison of outputs, the card and the manifest."""
    origin, verb, copied = work.source.origin, work.verb, Copied()
    if origin.folder is not None:
        copied = copy_companions(origin.folder, folder, origin.files, config=origin.config)
    names = work.names
    found = agreement(work.source, work.view, folder, names) if work.compare else None
    if found is not None:
        seen.append(found)
        if not found.holds:
            raise NotKept(f"nothing is kept: outputs {found.words}; lower --condition, or lock float32 weights")
    left = left_of(work.key, work.found)
    write_file(folder / "README.md", _card(work, job, folder, found, left))
    noted = {**work.told, "left": left}
    if found is not None:
        noted["logits"] = found.plain
    changed = stored_as(work.source, names)
    how = {k.name: f"{verb}ed" if k.name in changed else "copied" for k in job.plan.keys}
    companions = {"files": copied.files, "modules": copied.modules, "left": copied.left}
    job.manifest(folder, records, verb, how, companions=companions, **{verb: noted})


def _card(work: Work, job: Job, folder: Path, found: Agreement | None, left: Mapping[str, str]) -> str:
    told = work.told
    if work.verb == "lock":
        lines = [
            f"This model is **locked** (key hash `{told['key']}`): it computes what the model below does, in another "
            f"basis ({', '.join(told['parts'])}; matrices of condition up to {told['condition']:g}).",
            NOT_PROTECTED,
        ]
    else:
        lines = [f"This model was unlocked (key hash `{told['key']}`)."]
    if found is None:
        lines.append("Its outputs were not compared with those before.")
    else:
        lines.append(f"On random inputs its outputs {found.words}.")
    if left:
        lines.append(f"Left as it is, or weak: {some([f'{name} ({why})' for name, why in left.items()])}.")
    return model_card(
        title=folder.name if folder.name != "files" else f"{work.verb.capitalize()}ed model",
        models=[CardModel("model")],
        method="\n\n".join(lines),
        recipe=job.recipe,
        licences=job.licences(),
        about=about(work.source.origin.folder, folder),
        version=__version__,
        command="",
    )
