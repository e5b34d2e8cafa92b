"""What speaks against locking or unlocking a model, found before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weightsmith.align.bases import Bases
from weightsmith.align.running import memory_of
from weightsmith.core.errors import OutputError, PlanError, RecipeError, SourceError, did_you_mean
from weightsmith.core.problem import Code, Problem
from weightsmith.core.settings import Settings
from weightsmith.io.disk import gigabytes
from weightsmith.io.package.manifest import MANIFEST, lock_of
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.small import parse_json
from weightsmith.io.read.source import Source
from weightsmith.io.write.output import check_output
from weightsmith.observe.memory import available_memory
from weightsmith.protect.key import PARTS, Key, new_secret
from weightsmith.protect.locking import change_of, sample, shapes_of

__all__ = ["lock_notes", "refuse_locked", "refuse_memory", "refuse_obstacles", "refuse_other_lock",
           "refuse_other_model", "refuse_place", "refuse_words"]  # fmt: skip


def refuse_words(parts: Sequence[str], condition: float, seed: int | None) -> None:
    for part in parts:
        if part not in PARTS:
            raise RecipeError(f"parts: {part!r} is no part of a lock{did_you_mean(part, PARTS)}")
    if not parts:
        raise RecipeError(f"parts: name at least one of {', '.join(PARTS)}")
    if not 1 <= condition <= 1e4:
        raise RecipeError(f"condition = {condition:g} is outside [1, 10000]")
    if seed is not None and seed < 0:
        raise RecipeError(f"seed = {seed} is negative")


def refuse_place(path: Path, out: Path, source: Source) -> None:
    """No key lies where it would be shared with a model, or copied along with it."""
    here = path.expanduser().resolve()
    for folder in (out, source.origin.folder):
        if folder is not None and here.is_relative_to(folder.expanduser().resolve()):
            raise OutputError(f"{path} lies in {folder}, which may be shared; keep the key elsewhere")
    if not here.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {here.parent}; make it first")


def refuse_locked(source: Source) -> None:
    if lock_notes(source):
        raise SourceError(f"{source} is locked already; unlock it first")
    text = config_of(source)
    config = parse_json(text.encode(errors="surrogateescape"), f"{source}: config.json") if text else {}
    if isinstance(config, dict) and config.get("quantization_config"):
        raise SourceError(f"{source} is quantised; lock the model before it is")


def lock_notes(source: Source) -> Mapping[str, Any]:
    """What a model's manifest says of its lock; empty where it is not locked, or has no manifest."""
    return lock_of(source.origin.folder)


def refuse_obstacles(source: Source, out: Path, settings: Settings, more: Sequence[Path]) -> None:
    """Before the proof, which takes longer than it takes to see them."""
    if settings.resume and (out / MANIFEST).is_file():
        return
    read = (*source.origin.locations, *more)
    if problems := check_output(out, read, settings.overwrite, settings.resume, 0):
        raise PlanError(problems)


def refuse_other_lock(
    path: Path,
    key: Key,
    source: Source,
    found: Bases,
    parts: Sequence[str],
    condition: float,
    modules: Sequence[str],
    seed: int | None,
) -> None:
    if key.shapes != shapes_of(source) or key.unlocked != sample(source, change_of(key, found).names):
        raise SourceError(f"{path} is the key of another model; choose another file for the key of {source}")
    if (set(parts), float(condition), tuple(modules)) != (set(key.parts), key.condition, key.modules):
        said = f"parts {','.join(key.parts)}, condition {key.condition:g}, modules {' '.join(key.modules)}"
        raise SourceError(f"{path} was made for another lock of this model ({said}); take another file, or say so")
    if seed is not None and new_secret(seed) != key.secret:
        raise SourceError(f"{path} holds another key than that of seed {seed}; take another file, or no seed")


def refuse_other_model(path: Path, key: Key, source: Source, found: Bases) -> list[Problem]:
    """Warnings for a model that this key locked, but that was changed since."""
    noted = lock_notes(source)
    if noted and noted.get("key") != key.hash:
        said = f"its hash is {key.hash[:12]}, that of the model's key {str(noted.get('key'))[:12]}"
        raise SourceError(f"{path} is not the key that {source} was locked with ({said})")
    if key.shapes != shapes_of(source):
        raise SourceError(f"{path} is the key of another model: {source} has other tensors")
    if key.locked == sample(source, change_of(key, found).names):
        return []
    if not noted:
        raise SourceError(f"{path}: {source} is not what this key locked: its weights are others")
    text = f"{source} was changed since it was locked; what was changed is unlocked with it"
    return [Problem(Code.EARLIER, "model", text)]


def refuse_memory(source: Source, compare: bool, settings: Settings) -> None:
    """The check runs the model in float32."""
    if not compare:
        return
    need = memory_of(source)
    room = settings.memory if settings.memory is not None else available_memory(torch.device("cpu"))
    if room is not None and need > room:
        raise PlanError([
            f"running {source} before and after takes about {gigabytes(need)} of memory, and {gigabytes(room)} are "
            "there; use a larger machine, or pass --no-compare (the proof on a small model is made all the same)"
        ])  # fmt: skip
