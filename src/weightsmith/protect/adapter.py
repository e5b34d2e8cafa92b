"""LoRA adapters of a model in the basis of its locked one, and back.

A change s B A of W [out, in] becomes (L_out B)(A L_in^T) where W becomes L_out W L_in^T: the rows of B are treated as
W's outputs are, the columns of A as its inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
from weightsmith.io.read.adapter import CONFIG, open_weights, read_config
from weightsmith.io.read.aligned import ReorderedSource
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.open import open_source
from weightsmith.io.read.small import read_small
from weightsmith.io.read.source import Source
from weightsmith.io.read.turned import TurnedSource
from weightsmith.jobs.job import Job, Records
from weightsmith.protect.key import Key, read_key
from weightsmith.protect.locking import Change, change_of, inverted, places_of, shapes_of
from weightsmith.protect.package import Locked
from weightsmith.protect.refusals import refuse_obstacles, refuse_place
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

__all__ = ["lock_adapter", "unlock_adapter"]

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_WHOLE = re.compile(r"(?:base_model\.model\.)?(?P<name>.+?)")
_LIMIT = 10_000_000

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

    Raises SourceError for adapters that are no plain LoRA where the lock changes weights (DoRA, stacked experts).
    """
    key = read_key(path)
    config = read_config(adapter)
    if config.get("peft_type") != "LORA":
        raise SourceError(f"{adapter}: peft_type {config.get('peft_type')} cannot be carried over; merge it first")
    base = model if isinstance(model, Source) else open_source(model)
    if shapes_of(base) != key.shapes:
        raise SourceError(f"{path} is the key of another model than {base}")
    weights = open_weights(adapter)
    refuse_place(path, out, weights)
    refuse_obstacles(weights, out, settings, [path, adapter])
    view = _view(weights, packed_like_memory(base), change_of(key, bases(base)), verb, key)
    recipe = Recipe(models={"model": ModelRef(model=str(adapter))}, method=(StageSpec(name="keep"),))
    job = Job.planned(
        recipe, settings, partial(_package, verb, adapter, key), out=out, sources=Inputs(None, {"model": view}),
        weights="adapter_model",
    )  # fmt: skip
    told = {"models": {"model": {"model": str(adapter.resolve())}}, verb: {"key": key.hash}}
    return Locked(replace(job, recipe=told).run(out, settings), key.hash, None, {})


def _view(weights: Source, base: Source, change: Change, verb: str, key: Key) -> Source:
    """The adapter's tensors, each changed as the weight's side that it stands for."""
    orders = change.orders if verb == "lock" else inverted(change.groups, change.orders)
    moved = places_of(base, change.groups, orders)
    own = by_tensor(change.turns if verb == "lock" else change.back)
    modules, changed = Modules(base), set(change.names)
    places: dict[str, dict[int, np.ndarray]] = {}
    turns: list[Turn] = []
    odd: list[str] = []
    for name in weights.keys:
        factor = _FACTOR.fullmatch(name)
        whole = _WHOLE.fullmatch(name)
        assert whole is not None
        stored = modules.stored(f"{factor['module']}.weight" if factor else whole["name"])
        if stored not in changed:
            if any(changed_name.startswith(f"{_module(name)}.") for changed_name in changed):
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
    return TurnedSource(ReorderedSource(weights, places), turns, {verb: key.hash})


def _module(name: str) -> str:
    """The module of a tensor that is neither a factor nor a weight: of a magnitude (DoRA), of an embedding's factor."""
    found = re.match(r"(?:base_model\.model\.)?(.+?)\.lora_", name)
    return found[1] if found else name


def _package(verb: str, adapter: Path, key: Key, job: Job, records: Records, folder: Path) -> Iterable[Path]:
    config = write_file(folder / CONFIG, read_small(adapter / CONFIG, _LIMIT))
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
    return [config, write_file(folder / "README.md", card), job.manifest(folder, records, verb, how, **noted)]
