"""Checkpoints that torch.distributed.checkpoint wrote in shards: each has parts of tensors under their full names.

`HuggingFaceStorageWriter(save_distributed=True)` writes a file `shard-00001-model-00001-of-00001.safetensors` for each
process.  Its metadata say at which place of the whole tensor each part begins (DCP_SHARDING_INFO: saved_offsets).  What
all processes have alike is in one of the files; a part may be empty.  No index names the files.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import DTYPES, Key
from weightsmith.io import system
from weightsmith.io.read.folder import FolderSource, inside
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import parse_json
from weightsmith.io.read.source import Bits, Origin, Source

__all__ = ["Piece", "ShardedSource", "fitted", "refuse_shard", "shards_in", "with_lost_scalars"]

_SHARD = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")
_INFO = "DCP_SHARDING_INFO"
_BESIDE = "sharded"
"""Where consolidation leaves the shards."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Piece(NamedTuple):
    """A part of a tensor: the file that holds it, its place in the whole, and its shape."""

    shard: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def shards_in(folder: Path) -> list[str]:
    """The names of the shards in a folder."""
    try:
        names = system.call(os.listdir, folder)
    except OSError:
        return []
    return sorted(name for name in names if _SHARD.fullmatch(name))


class ShardedSource(Source):
    """The model whose parts lie in the shards of a folder."""

    def __init__(self, folder: str | Path) -> None:
        folder, label = Path(folder), str(folder)
        names = shards_in(folder)
        self._parts = {name: SafetensorsSource(inside(folder, name)) for name in names}
        numbers = {int(found[1]) for name in names if (found := _SHARD.fullmatch(name))}
        if missing := sorted(set(range(1, max(numbers) + 1)) - numbers):
            raise SourceError(f"{label}: the shards of process {missing[0]} of {max(numbers)} are missing")
        pieces: dict[str, list[Piece]] = {}
        dtypes: dict[str, str] = {}
        for name, part in self._parts.items():
            offsets = _offsets(part, f"{label}/{name}")
            for key in part.keys.values():
                pieces.setdefault(key.name, []).append(Piece(name, offsets[key.name], key.shape))
                if dtypes.setdefault(key.name, key.dtype) != key.dtype:
                    raise SourceError(
                        f"{label}: {key.name!r} is {dtypes[key.name]} in one shard, {key.dtype} in {name}"
                    )
        self._pieces = {name: fitted(name, found, label) for name, found in pieces.items()}
        self.keys = {name: Key(name, _whole(found), dtypes[name]) for name, found in self._pieces.items()}
        files = [part.path for part in self._parts.values()]
        self.origin = Origin(label, folder, tuple(names), (folder, *files), checkpoint=folder)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        pieces = self._pieces[key.name]
        if len(pieces) == 1:
            return self._parts[pieces[0].shard].block(key.name, low, high, into)
        first, last, _ = slice(low, high).indices(key.rows)
        shape = (max(last - first, 0), *key.shape[1:])
        out = np.empty(shape, _UNSIGNED[DTYPES[key.dtype].itemsize]) if into is None else into
        for piece in pieces:
            start, stop = max(first, piece.offsets[0]), min(last, piece.offsets[0] + piece.shape[0])
            if start >= stop:
                continue
            place = tuple(slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.shape[1:], strict=True))
            rows = start - piece.offsets[0], stop - piece.offsets[0]
            out[(slice(start - first, stop - first), *place)] = self._parts[piece.shard].bits(key.name, *rows)
        return Bits(out, key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        for part in self._parts.values():
            files.update(part.fingerprint()["files"])
        return {"files": files}


def _offsets(part: SafetensorsSource, label: str) -> dict[str, tuple[int, ...]]:
    """Tensor -> where in the whole its part in this file begins."""
    text = part.header.metadata.get(_INFO, "{}")
    noted = parse_json(text.encode(errors="surrogateescape"), f"{label}: {_INFO}")
    found = {}
    for key in part.keys.values():
        entry = noted.get(key.name, {}) if isinstance(noted, dict) else None
        given = entry.get("saved_offsets", [0] * len(key.shape)) if isinstance(entry, dict) else None
        fits = (
            isinstance(given, list) and len(given) == len(key.shape) and all(type(n) is int and n >= 0 for n in given)
        )
        if given is None or not fits:
            raise SourceError(f"{label}: {_INFO} says nothing sensible about {key.name!r}")
        found[key.name] = tuple(given)
    return found


def fitted(name: str, pieces: list[Piece], label: str) -> tuple[Piece, ...]:
    """The parts that hold something, which together have to be the whole tensor."""
    held = [piece for piece in pieces if math.prod(piece.shape)] or pieces[:1]
    if len({len(piece.shape) for piece in pieces}) > 1:
        raise SourceError(f"{label}: the parts of {name!r} have unlike numbers of axes")
    for i, one in enumerate(held):
        if other := next((other for other in held[:i] if _overlap(one, other)), None):
            raise SourceError(f"{label}: {name!r}: its parts in {other.shard} and {one.shard} overlap")
    whole, there = math.prod(_whole(held)), sum(math.prod(piece.shape) for piece in held)
    if there != whole:
        files = some(sorted({piece.shard for piece in held}))
        raise SourceError(f"{label}: {name!r}: {there} of {whole} entries are there ({files}); a shard is missing")
    return tuple(held)


def _whole(pieces: Iterable[Piece]) -> tuple[int, ...]:
    """The shape of the tensor that parts belong to."""
    ends = [[o + n for o, n in zip(piece.offsets, piece.shape, strict=True)] for piece in pieces]
    return tuple(max(axis) for axis in zip(*ends, strict=True))


def _overlap(one: Piece, other: Piece) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )


# --- one shard, and what consolidation lost --------------------------------------------------------


def refuse_shard(source: SafetensorsSource) -> SafetensorsSource:
    """The source, unless it is one of several shards: then it would be a model with parts of its tensors."""
    if _INFO in source.header.metadata:
        beside = [name for name in shards_in(source.path.parent) if name != source.path.name]
        begins = {name: offsets for name, offsets in _offsets(source, str(source)).items() if any(offsets)}
        if beside or begins:
            raise SourceError(
                f"{source}: one shard of a distributed checkpoint, with parts of its tensors under their full names; "
                f"give the folder of all shards, {source.path.parent}"
            )
    return source


def with_lost_scalars(source: FolderSource) -> FolderSource:
    """The source, with a remark where the shards beside it have other scalars.

    torch 2.13 writes every tensor without axes as 0.0 when it consolidates shards.
    """
    folder = source.origin.folder
    if folder is None or not shards_in(folder / _BESIDE):
        return source
    whole = ShardedSource(folder / _BESIDE)
    lost = list(_unlike_scalars(source, whole))
    if lost:
        remark = (
            f"{some(lost)}: another value than in {_BESIDE}/, from which torch put the file together (torch 2.13 loses "
            f"tensors without axes there); give {folder / _BESIDE} to merge what was trained"
        )
        source.origin = replace(source.origin, remarks=(*source.origin.remarks, remark))
    return source


def _unlike_scalars(source: Source, whole: Source) -> Iterator[str]:
    for name, key in whole.keys.items():
        alike = not key.shape and source.keys.get(name) == key
        if alike and not np.array_equal(source.bits(name), whole.bits(name)):
            yield name
