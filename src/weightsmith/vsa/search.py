"""Search a folder of recipes, manifests and cards by example, with an index file that is kept up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import OutputError, SourceError, WeightsmithError, did_you_mean
from weightsmith.vsa.documents import documents, read_document, stamp
from weightsmith.vsa.encode import Encoder, Noise, leaves, noise, path_of
from weightsmith.vsa.index import Hit, Index

__all__ = ["INDEX", "Found", "find", "refreshed"]

INDEX = ".weightsmith-index"
"""The file in a folder that keeps its vectors."""

_PROBED = 200  # values that a probe is compared with
_CERTAIN = 4  # standard deviations of noise from which a probed value is told


@dataclass(frozen=True)
class Found:
    """What a search gave.

    hits      the nearest entries
    probed    name -> (value, cosine) of the field that was asked for, where it stands out from noise
    total     entries of the index, of which `read` were read now
    noise     predicted for the query's fields;  spread: measured standard deviation of all cosines around their mean
    warnings  files that could not be read
    """

    hits: list[Hit]
    probed: Mapping[str, tuple[Any, float]]
    total: int
    read: int
    noise: Noise
    spread: float
    warnings: list[str]


def find(
    query: Path | Mapping[str, Any],
    folder: Path,
    encoder: Encoder | None = None,
    *,
    count: int = 10,
    path: str | None = None,
    index: Path | None = None,
    rebuild: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Found:
    """Search by example: the query holds what is wanted, and fields it lacks count for nothing.

    path     of a field, as 'parameters.density': what each hit has there is read out of its vector
    index    the index file, default: in the folder;  rebuild: make it anew
    """
    warnings: list[str] = []
    encoder = encoder or Encoder(warn=warnings.append)
    value = read_document(query) if isinstance(query, Path) else query
    if not isinstance(value, Mapping) or not value:
        raise SourceError(f"{query}: a query is a mapping with at least one field")
    vector = encoder.encode(value)
    found, fresh = refreshed(folder, encoder, index or folder / INDEX, rebuild, warnings.append, progress)
    if not len(found):
        raise SourceError(f"{folder}: no recipe, manifest or model card in it")
    own = (
        None
        if not isinstance(query, Path) or not query.is_relative_to(folder)
        else query.relative_to(folder).as_posix()
    )
    cosines = found.cosines(vector)
    hits = [hit for hit in found.best(cosines, count + 1) if hit.name != own][:count]
    probed = {} if path is None else _probed(encoder, found, hits, folder, path)
    fields = len(value)
    return Found(
        hits, probed, len(found), fresh, noise(fields, encoder.dim, len(found)), float(cosines.std()), warnings
    )


def refreshed(
    folder: Path,
    encoder: Encoder,
    place: Path,
    rebuild: bool,
    warn: Callable[[str], object],
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Index, int]:
    """The index of a folder as it is now, and how many files were read for it; its file is written where that changed.

    Raises SourceError where the file was made with other settings.
    """
    old = Index.load(place).checked(encoder, str(place)) if place.exists() and not rebuild else None
    known = {} if old is None else {name: i for i, name in enumerate(old.names)}
    names: list[str] = []
    notes: dict[str, Any] = {}
    rows: list[np.ndarray] = []
    fresh = 0
    paths = list(documents(folder))
    for done, path in enumerate(paths):
        name, now = path.relative_to(folder).as_posix(), stamp(path)
        if old is not None and name in known and old.notes.get(name) == now:
            vector: np.ndarray | None = old.vectors[known[name]]
        else:
            vector = _vector(path, encoder, warn)
            fresh += 1
        if vector is not None:
            names.append(name)
            notes[name] = now
            rows.append(vector)
        if progress:
            progress(done + 1, len(paths))
    vectors = np.stack(rows) if rows else np.empty((0, encoder.dim), np.float32)
    index = Index(encoder.schema, names, vectors, notes)
    if fresh or old is None or old.names != names:
        try:
            index.save(place)
        except OutputError as error:
            warn(f"{error}; the index is not kept")
    return index, fresh


def _vector(path: Path, encoder: Encoder, warn: Callable[[str], object]) -> np.ndarray | None:
    try:
        value = read_document(path)
        return encoder.encode(value) if isinstance(value, Mapping) and value else None
    except WeightsmithError as error:
        warn(f"{path.name} is left out: {str(error).splitlines()[0]}")
        return None


def _probed(encoder: Encoder, index: Index, hits: list[Hit], folder: Path, path: str) -> dict[str, tuple[Any, float]]:
    """For each hit the value, of all that the hits' files have at that path, which its vector is nearest to."""
    values: list[Any] = []
    seen: set[str] = set()
    for hit in hits:
        tree = read_document(folder / hit.name)
        seen.update(name for name, _ in leaves(tree))
        value = _at(tree, path)
        if value is not None and value not in values:
            values.append(value)
    if not values:
        raise SourceError(f"no hit has a field {path!r}{did_you_mean(path, seen)}")
    place = {name: i for i, name in enumerate(index.names)}
    out = {}
    for hit in hits:
        vector = encoder.probe(index.vectors[place[hit.name]], path)
        cosine, value = encoder.nearest(vector, values[:_PROBED], path)[0]
        if cosine > _CERTAIN * noise(1, encoder.dim, 1).spread:  # a vector without the field gives noise
            out[hit.name] = (value, cosine)
    return out


def _at(tree: Any, path: str) -> Any:
    for key in path_of(path):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
