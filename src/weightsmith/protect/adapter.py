"""LoRA adapters of a model in the basis of its locked one, and back.

A change s B A of W [out, in] becomes (L_out B)(A L_in^T) where W becomes L_out W L_in^T: the rows of B are treated as
W's outputs are, the columns of A as its inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith import __version__
from weightsmith.align.bases import bases
from weightsmith.core.errors import SourceError, some
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.turn import Turn, by_tensor
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import write_file
from weightsmith.io.package.card import CardModel, model_card
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.io.read.adapter import CONFIG, open_weights, read_config
from weightsmith.io.read.aligned import ReorderedSource
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.read.turned import TurnedSource
from weightsmith.jobs.job import Job, Records
from weightsmith.protect.key import Key, read_key
from weightsmith.protect.locking import Change, change_of, places_of, sample, shapes_of
from weightsmith.protect.package import Locked
from weightsmith.protect.refusals import refuse_obstacles, refuse_place
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

__all__ = ["lock_adapter", "unlock_adapter"]

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_AROUND = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)")

Places = Mapping[str, Mapping[int, np.ndarray]]


def lock_adapter(
    adapter: str | Path, model: str | Path | Source, out: str | Path, key: str | Path, *, settings: Settings = DEFAULT
) -> Locked:
    """Write a LoRA adapter of a model so that it fits the locked model; see `_carried`."""
    return _carried("lock", Path(adapter), model, Path(out), Path(key), settings)


def unlock_adapter(
    adapter: str | Path, model: str | Path | Source, out: str | Path, key: str | Path, *, settings: Settings = DEFAULT
) -> Locked:
    """Write a LoRA adapter of a locked model so that it fits the model as it was; see `_carried`."""
    return _carried("unlock", Path(adapter), model, Path(out), Path(key), settings)


def _carried(verb: str, adapter: Path, model: str | Path | Source, out: Path, path: Path, settings: Settings) -> Locked:
    """model: locked or not, it tells names and shapes only.

    Raises SourceError for adapters that are no plain LoRA where the lock changes weights (DoRA, stacked experts), that
    were carried over already, or that belong to a model that the key did not lock.
    """
    key = read_key(path)
    config = read_config(adapter)
    if config.get("peft_type") != "LORA":
        raise SourceError(f"{adapter}: peft_type {config.get('peft_type')} cannot be carried over; merge it first")
    base = model if isinstance(model, Source) else open_source(model)
    weights = open_weights(adapter)
    refuse_place(path, out, weights)
    refuse_obstacles(weights, out, settings, [path, adapter])
    change = change_of(key, bases(base), verb) if shapes_of(base) == key.shapes else None
    found = "" if change is None else sample(base, change.names)
    if change is None or found not in (key.unlocked, key.locked):
        raise SourceError(f"{path} is the key of another model than {base}")
    if _made_by(adapter) == (verb, key.hash):
        raise SourceError(f"{adapter} was {verb}ed with this key already")
    view = _view(weights, packed_like_memory(base), change, key)
    fits = base.origin.folder if found == (key.locked if verb == "lock" else key.unlocked) else None
    recipe = Recipe(models={"model": ModelRef(model=str(adapter))}, method=(StageSpec(name="keep"),))
    job = Job.planned(
        recipe, settings, partial(_package, verb, adapter, fits, key), out=out, sources=Inputs(None, {"model": view}),
        weights="adapter_model",
    )  # fmt: skip
    told = {"models": {"model": {"model": str(adapter.resolve())}}, verb: {"key": key.hash}}
    return Locked(replace(job, recipe=told).run(out, settings), key.hash, None, {})


def _view(weights: Source, base: Source, change: Change, key: Key) -> Source:
    """The adapter's tensors, each changed as the weight's side that it stands for."""
    moved = places_of(base, change)
    own = by_tensor(change.turns)
    modules, changed = Modules(base), set(change.names)
    places: dict[str, dict[int, np.ndarray]] = {}
    turns: list[Turn] = []
    odd: list[str] = []
    for name in weights.keys:
        factor = _FACTOR.fullmatch(name)
        plain = f"{factor['module']}.weight" if factor else _AROUND.sub("", name)
        stored = modules.stored(plain)
        if stored not in changed:
            if stored not in base.keys and any(_inside(plain, _module(name), one) for one in changed):
                odd.append(name)
            continue
        if factor is None:
            sides = {axis: axis for axis in range(len(base.key(stored).shape))}
        else:
            flipped = bool(modules.flipped(stored.rpartition(".")[0]))
            sides = {1 if flipped else 0: 0} if factor["side"] == "B" else {0 if flipped else 1: 1}
        here = {sides[axis]: index for axis, index in moved.get(stored, {}).items() if axis in sides}
        if any(index.ndim > 1 for index in here.values()) or (len(weights.key(name).shape) != 2 and factor):
            odd.append(name)
        if here:
            places[name] = here
        turns += [replace(t, name=name, axis=sides[t.axis]) for t in own.get(stored, ()) if t.axis in sides]
    if odd:
        raise SourceError(f"{weights}: {some(odd)} cannot be carried over to a locked model; merge the adapter first")
    return TurnedSource(ReorderedSource(weights, places), turns, {change.verb: key.hash})


def _inside(plain: str, module: str, changed: str) -> bool:
    """Whether a tensor of an adapter belongs to a module that the lock changes, as far as names tell."""
    return changed.startswith(f"{module}.") or plain.startswith(f"{changed.rpartition('.')[0]}.")


def _made_by(adapter: Path) -> tuple[str, str]:
    """The verb that wrote an adapter, and the hash of its key."""
    if not (adapter / MANIFEST).is_file():
        return "", ""
    made = read_manifest(adapter)
    verb = str(made.get("kind"))
    noted = made.get(verb)
    return verb, str(noted.get("key")) if isinstance(noted, dict) else ""


def _module(name: str) -> str:
    """The module of a tensor that is neither a factor nor a weight: of a magnitude (DoRA), of an embedding's factor."""
    found = re.match(r"(?:base_model\.model\.)?(.+?)\.lora_", name)
    return found[1] if found else name


def _package(verb: str, adapter: Path, fits: Path | None, key: Key, job: Job, records: Records, folder: Path) -> None:
    """fits: the model that the carried adapter belongs to, where it is known; the old one would load and be wrong."""
    edited = dict(read_config(adapter)) | {"base_model_name_or_path": None if fits is None else str(fits)}
    write_file(folder / CONFIG, json.dumps(edited, indent=2, ensure_ascii=False) + "\n")
    card = model_card(
        title=folder.name if folder.name != "files" else f"{verb.capitalize()}ed adapter",
        models=[CardModel("adapter")],
        method=f"A LoRA adapter for the model that was {verb}ed with the key of hash `{key.hash}`.",
        recipe=job.recipe,
        about={"library_name": "peft"},
        version=__version__,
        command="",
    )
    how = {k.name: f"{verb}ed" for k in job.plan.keys}
    noted: dict[str, Any] = {verb: {"key": key.hash, "adapter": True}}
    write_file(folder / "README.md", card)
    job.manifest(folder, records, verb, how, **noted)
