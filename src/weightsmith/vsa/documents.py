"""Files that are searched: recipes, manifests and the front matter of model cards, as plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.io import system
from weightsmith.io.package.card import front_matter
from weightsmith.io.package.manifest import MANIFEST
from weightsmith.io.read.small import read_small
from weightsmith.recipe.reader import read
from weightsmith.vsa.encode import DEEPEST

__all__ = ["documents", "read_document", "stamp"]

_LIMIT = 100_000_000  # bytes of a JSON file; manifests of large models have many
_SUFFIXES = (".yaml", ".yml", ".json")
_NOT = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "trainer_state.json"),
)
"""JSON files beside weights that say nothing of how a model was made."""


def documents(folder: Path) -> Iterator[Path]:
    """Files below a folder that may be recipes, manifests or cards, in the order of their names."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder to search")
    for here, folders, names in system.call(list, os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            wanted = name == "README.md" or (name.endswith(_SUFFIXES) and not name.endswith(".index.json"))
            if (
                wanted
                and (Path(here) / name).is_file()
                and name not in _NOT
                and not name.startswith(".")
                and "/." not in f"{here}/"[len(str(folder)) :]
            ):
                yield Path(here) / name


def stamp(path: Path) -> list[int]:
    """What tells whether a file was changed."""
    found = system.call(path.stat)
    return [found.st_size, found.st_mtime_ns]


def read_document(path: Path) -> Any:
    """The values of a file: of a manifest its recipe, of a card its front matter.

    Raises SourceError for what cannot be read, with the place of a key that is there twice.
    """
    if path.name == "README.md":
        return {name: values[0] if len(values) == 1 else values for name, values in front_matter(path).items()}
    raw = read_small(path, _LIMIT)
    if path.suffix == ".json":
        value = _json(raw, str(path))
        if path.name == MANIFEST and isinstance(value, dict) and "recipe" in value:
            return value["recipe"]
        return value
    try:
        return read(raw.decode("utf-8"), str(path)).tree
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error.reason})") from None
    except WeightsmithError as error:
        raise SourceError(str(error)) from None


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs, before repeated names are looked for."""


def _json(raw: bytes, label: str) -> Any:
    try:
        return _plain(json.loads(raw.decode("utf-8"), object_pairs_hook=_Pairs), label, "", 0)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{label}: not valid JSON ({type(error).__name__}: {error})") from None


def _plain(value: Any, label: str, path: str, depth: int) -> Any:
    if depth > DEEPEST:
        raise SourceError(f"{label}: {path[:80]}: nested deeper than {DEEPEST} levels")
    if isinstance(value, _Pairs):
        found: dict[str, Any] = {}
        for name, inner in value:
            here = f"{path}.{name}" if path else name
            if name in found:
                raise SourceError(f"{label}: {here[:80]!r} is there twice")
            found[name] = _plain(inner, label, here, depth + 1)
        return found
    if isinstance(value, list):
        return [_plain(inner, label, f"{path}[{i}]", depth + 1) for i, inner in enumerate(value)]
    return value
