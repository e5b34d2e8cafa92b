"""What lies in the folders: models, adapters, recipes, results, searches; from names and small files alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.package.card import UNKNOWN, licences
from weightsmith.io.package.manifest import MANIFEST
from weightsmith.io.read.adapter import CONFIG as ADAPTER
from weightsmith.io.read.open import ENDINGS
from weightsmith.io.read.small import read_json
from weightsmith.studio.places import Places

__all__ = ["Model", "Shelf", "layers", "shelf", "shelve"]

_CONFIG_LIMIT, _RECIPE_LIMIT = 5_000_000, 1_000_000
_DEEPEST, _MOST = 6, 20_000  # levels, folders
_RECIPE = re.compile(rb"""^\{?\s*["']?(models|merge_method)["']?\s*:""", re.MULTILINE)
_RESULT = "result.json"


@dataclass(frozen=True)
class Model:
    """A model or adapter as its folder (or single file) tells; '' where that says nothing."""

    path: Path
    name: str
    kind: str  # model, adapter, compressed, checkpoint
    nbytes: int
    modified: float
    architecture: str = ""
    dtype: str = ""
    licence: str = ""
    base: str = ""
    made: bool = False
    layers: int | None = None


@dataclass
class Shelf:
    """All of it, in the order of the paths."""

    models: list[Model] = field(default_factory=list)
    recipes: list[Path] = field(default_factory=list)
    searches: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    cut: bool = False
    """There were too many folders to look at all."""


def shelf(places: Places, details: bool = True) -> Shelf:
    """Walk through the folders; `details=False` leaves out what is said inside of files."""
    found = Shelf()
    seen = 0
    for top in places.folders:
        for here, names in _walk(top):
            seen += 1
            if seen > _MOST:
                found.cut = True
                return found
            shelve(found, here, names, places, details)
    return found


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    for here, folders, names in os.walk(top):
        deep = len(Path(here).relative_to(top).parts)
        folders[:] = sorted(n for n in folders if not n.startswith((".", "__")) and not n.endswith(".partial"))
        if deep >= _DEEPEST:
            folders[:] = []
        yield Path(here), sorted(names)


def shelve(found: Shelf, here: Path, names: list[str], places: Places, details: bool) -> None:
    """Note what lies in one folder."""
    weights = [name for name in names if name.endswith(ENDINGS) and places.holds(here / name)]
    if MANIFEST in names:
        found.results.append(here)
    if _RESULT in names and "recipe.yaml" in names:
        found.searches.append(here)
    found.recipes += [here / name for name in names if _is_recipe(here / name, names)]
    if "config.json" in names or ADAPTER in names or MANIFEST in names:
        if weights:
            found.models.append(_model(here, weights, names, places, details))
    elif (len(weights) == 1 and here not in places.folders) or any(name.endswith(".index.json") for name in names):
        found.models.append(_model(here, weights, names, places, details))
    else:
        found.models += [_model(here / name, [""], [], places, details) for name in weights]


def _model(path: Path, weights: list[str], names: list[str], places: Places, details: bool) -> Model:
    nbytes, modified = 0, 0.0
    for name in weights:
        try:
            noted = system.call((path / name).stat if name else path.stat)
        except OSError:
            continue
        nbytes, modified = nbytes + noted.st_size, max(modified, noted.st_mtime)
    kind = "adapter" if ADAPTER in names else "model" if names else "checkpoint"
    said: dict[str, Any] = {}
    if details and kind == "adapter":
        config = _config(path / ADAPTER)
        said = {"architecture": _word(config.get("peft_type")), "base": _word(config.get("base_model_name_or_path"))}
    elif details and "config.json" in names:
        said = _of_config(_config(path / "config.json"))
    if details and "README.md" in names:
        licence = _licence(path)
        said["licence"] = "" if licence == UNKNOWN else licence
    return Model(path, places.shown(path), kind, nbytes, modified, made=MANIFEST in names, **said)


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    kinds = config.get("architectures")
    layers = inner.get("num_hidden_layers", inner.get("n_layer")) if isinstance(inner, dict) else None
    dtype = _word(config.get("dtype", config.get("torch_dtype")))
    return {
        "architecture": _word(kinds[0] if isinstance(kinds, list) and kinds else config.get("model_type")),
        "dtype": dtype,
        "layers": layers if isinstance(layers, int) and 0 < layers < 10_000 else None,
    }


def layers(folder: Path) -> int | None:
    """The number of blocks that a folder's config tells."""
    found: int | None = _of_config(_config(folder / "config.json"))["layers"]
    return found


def _config(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path, _CONFIG_LIMIT)
    except (SourceError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _licence(folder: Path) -> str:
    try:
        return licences({"it": folder})["it"]
    except SourceError:
        return UNKNOWN


def _word(value: object) -> str:
    """A stranger's word, short."""
    return value[:120] if isinstance(value, str) else ""


def _is_recipe(path: Path, beside: list[str]) -> bool:
    """Whether a file begins like a recipe; those inside of models and results are not meant."""
    if not path.name.endswith((".yaml", ".yml")) or path.name.startswith(".") or "config.json" in beside:
        return False
    try:
        return bool(_RECIPE.search(system.read_file(path, 65_536)))
    except OSError:
        return False
