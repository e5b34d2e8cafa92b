"""Models in several folders: pipelines of diffusers, and the modules of Sentence-Transformers models.

A part's tensors have its name in front: `unet.conv_in.weight`, `2_Dense.linear.weight`.  So recipes choose parts by
globs, and the output has each part in a folder of its own, under the names that its library looks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.read.folder import WEIGHTS, choose_weights, is_inside
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import DIFFUSION, Cost, LowRank, Origin, Source
from weightsmith.io.read.views import JoinedSource

__all__ = ["MODULES", "PIPELINE", "PartsSource", "module_folders", "pipeline", "with_modules", "without_root"]

PIPELINE = "model_index.json"
MODULES = "modules.json"
_LIMIT = 1_000_000  # bytes of either
_WEIGHTS = ("model.safetensors", f"{DIFFUSION}.safetensors", "pytorch_model.bin", f"{DIFFUSION}.bin")
_OTHERS = tuple(f".{kind}" for kind in WEIGHTS if kind != "safetensors")
"""Endings of files that may hold the weights of a component in a way that is not read."""


class PartsSource(JoinedSource):
    """The tensors of several folders, with each part's name in front; '' is the model in the folder itself."""

    shows = "parts"

    def __init__(self, folder: Path, parts: Mapping[str, Source], origin: Origin) -> None:
        names: dict[str, tuple[int, str]] = {}
        files: list[str] = []
        stores: dict[str, str] = {}
        for i, (part, source) in enumerate(parts.items()):
            front = f"{part.replace('/', '.')}." if part else ""
            names |= {front + name: (i, name) for name in (*source.keys, *source.aliases)}
            files += [(PurePosixPath(part) / file).as_posix() for file in source.origin.files]
            stem = source.origin.stores.get("", "model")
            stores[front] = (PurePosixPath(part) / stem).as_posix()
        locations = dict.fromkeys(
            place for one in (origin, *(source.origin for source in parts.values())) for place in one.locations
        )
        remarks = tuple(f"{part}: {text}" for part, source in parts.items() if part for text in source.origin.remarks)
        for part, source in parts.items():
            if part and source.origin.config is not None:
                raise SourceError(f"{origin.label}: {part} is quantised; merge that folder alone")
        made = replace(
            origin,
            folder=folder,
            files=tuple(files),
            locations=tuple(locations),
            remarks=(*origin.remarks, *remarks),
            cost=sum((source.origin.cost for source in parts.values()), Cost()),
            stores=stores,
        )
        super().__init__(tuple(parts.values()), names, made)

    def factors(self, name: str, base: Source) -> LowRank | None:
        part, inner = self.own(name)
        return part.factors(inner, base.own(name)[0]) if isinstance(base, PartsSource) else None


def pipeline(folder: Path, opened: Callable[[Path], Source]) -> PartsSource:
    """The model in a folder of diffusers with a model_index.json: every component that has weights.

    opened  opens the folder of one component
    """
    index = read_json(folder / PIPELINE, _LIMIT)
    names = [name for name in index if not name.startswith("_")] if isinstance(index, dict) else []
    parts = {name: opened(folder / name) for name in names if _has_weights(folder, name)}
    for name in names:
        if name not in parts and (found := _other_weights(folder, name)):
            raise SourceError(f"{folder / name / found}: weights of this kind are not read; save {name} as safetensors")
    if not parts:
        raise SourceError(f"{folder}: none of the components that {PIPELINE} names has weights")
    return PartsSource(folder, parts, Origin(str(folder), folder, locations=(folder,)))


def _other_weights(folder: Path, name: str) -> str:
    """A file that may hold a component's weights in a way that is not read, or ''."""
    place = folder / name
    if not is_inside(folder, name) or not place.is_dir():
        return ""
    return next((file for file in sorted(system.call(os.listdir, place)) if file.endswith(_OTHERS)), "")


def without_root(folder: Path) -> bool:
    """Whether a Sentence-Transformers folder has its weights in the folders of its modules alone."""
    return (folder / MODULES).is_file() and not _has_weights(folder, "") and bool(module_folders(folder))


def with_modules(folder: Path, root: Source | None, modules: Mapping[str, Source]) -> PartsSource | None:
    """A model with the opened modules of its Sentence-Transformers folder; None where there are none."""
    if not modules:
        return None
    origin = Origin(str(folder), folder, locations=(folder,)) if root is None else root.origin
    parts = modules if root is None else {"": root, **modules}
    return PartsSource(origin.folder or folder, parts, origin)


def module_folders(folder: Path) -> list[str]:
    """The folders below that hold weights of modules, in the order of modules.json, relative to it."""
    try:
        listed = read_json(folder / MODULES, _LIMIT)
        paths = [module["path"] for module in listed if module["path"] or _is_router(module)]
    except (SourceError, TypeError, KeyError) as error:
        text = f"{folder / MODULES}: not a list of modules with a path each ({error}); repair or remove it"
        raise SourceError(text) from error
    return [inner for path in dict.fromkeys(map(str, paths)) for inner in _weighty(folder, path)]


def _is_router(module: Mapping[str, Any]) -> bool:
    """Whether an entry of modules.json is a router, whose parts lie in folders below it (its own path may be '')."""
    return str(module.get("type", "")).rpartition(".")[2] in ("Router", "Asym")


def _weighty(folder: Path, path: str) -> Iterator[str]:
    """The folder of a module, or (of a router) those below it, that hold weights."""
    if not is_inside(folder, path or ".") or not (folder / path).is_dir():
        return
    if _has_weights(folder, path):
        yield path
        return
    for name in sorted(system.call(os.listdir, folder / path)):
        inner = (PurePosixPath(path) / name).as_posix()
        if (folder / inner).is_dir() and is_inside(folder, inner) and _has_weights(folder, inner):
            yield inner


def _has_weights(folder: Path, path: str) -> bool:
    place = folder / path
    if not is_inside(folder, path or ".") or not place.is_dir():
        return False
    names = system.call(os.listdir, place)
    if not any(name.startswith(_WEIGHTS) or name.endswith(".safetensors") for name in names):
        return False
    choose_weights(names, str(place))  # raises where nothing tells which file is the part's
    return True
