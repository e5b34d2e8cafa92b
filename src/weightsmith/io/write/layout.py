"""Where each tensor of the output lies: shards, their headers, and the index over them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from weightsmith.core.errors import OutputError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.io.read.safetensors import MAX_HEADER, MAX_PARTS, count_parts

__all__ = ["Shard", "Stores", "indices", "layout_digest", "plan_shards"]

Stores = Mapping[str, str]
"""Beginning of tensors' names -> how the names of the files begin that hold them, relative to the output's folder; the
longest beginning counts, and is no part of the names inside those files."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file of the output: its name, its first bytes, and each tensor's place in the file.

    store  how the names of its tensors begin that are kept together with it, and how the names of their files do
    """

    name: str
    header: bytes
    keys: Mapping[str, Key]
    offsets: Mapping[str, int]
    size: int
    store: tuple[str, str] = ("", "model")


def plan_shards(keys: Sequence[Key], shard_size: int, stores: str | Stores, metadata: Mapping[str, str]) -> list[Shard]:
    """Fill shards in the order of `keys`, up to `shard_size` bytes of data; a larger tensor has one to itself.

    Within a shard wider dtypes come first, so that every tensor starts at a multiple of its item size.
    stores  a text: all tensors are kept together under that name
    """
    named = {"": stores} if isinstance(stores, str) else dict(stores)
    order = sorted(named, key=len, reverse=True)
    apart: dict[str, list[Key]] = {prefix: [] for prefix in named}
    for key in keys:
        prefix = next((prefix for prefix in order if key.name.startswith(prefix)), None)
        if prefix is None:
            raise OutputError(f"{key.name} belongs to none of the parts {', '.join(named.values())} of the output")
        apart[prefix].append(key)
    held = {prefix: found for prefix, found in apart.items() if found} or {"": []}
    shards = [_stored(held[prefix], shard_size, (prefix, named.get(prefix, "model")), metadata) for prefix in held]
    return [shard for store in shards for shard in store]


def _stored(keys: Sequence[Key], shard_size: int, store: tuple[str, str], metadata: Mapping[str, str]) -> list[Shard]:
    groups: list[list[Key]] = [[]]
    room = shard_size
    for key in keys:
        if groups[-1] and key.nbytes > room:
            groups.append([])
            room = shard_size
        groups[-1].append(key)
        room -= key.nbytes
    count = len(groups)
    names = [f"{store[1]}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [f"{store[1]}.safetensors"]
    return [_shard(name, group, store, metadata) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, keys: Sequence[Key], store: tuple[str, str], metadata: Mapping[str, str]) -> Shard:
    prefix = store[0]
    inside = {new.removeprefix(prefix): old.removeprefix(prefix) for new, old in metadata.items()}
    entries: dict[str, Any] = {"__metadata__": dict(inside)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for key in sorted(keys, key=lambda key: -DTYPES[key.dtype].itemsize):
        if key.name in offsets or key.name.removeprefix(prefix) in ("", "__metadata__"):
            raise OutputError(f"{name}: tensor {key.name!r} cannot be stored: the name is reserved or used twice")
        offsets[key.name], end = end, end + key.nbytes
        data = [offsets[key.name], end]
        entries[key.name.removeprefix(prefix)] = {
            "dtype": DTYPES[key.dtype].code,
            "shape": list(key.shape),
            "data_offsets": data,
        }
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{name}: a tensor's name is no valid text: {error.object[:80]!a}") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(
            f"{name}: header of {len(text)} bytes is above the format's limit; choose a smaller shard_size"
        )
    if count_parts(text) > MAX_PARTS:
        raise OutputError(
            f"{name}: {len(keys)} tensors are more than one file is read with; choose a smaller shard_size"
        )
    header = len(text).to_bytes(8, "little") + text
    by_name = {key.name: key for key in keys}
    places = {n: len(header) + at for n, at in offsets.items()}
    return Shard(name, header, by_name, places, len(header) + end, store)


def indices(shards: Sequence[Shard]) -> dict[str, str]:
    """Name -> text of every `model.safetensors.index.json`, one for each store of several shards."""
    found: dict[tuple[str, str], list[Shard]] = {}
    for shard in shards:
        found.setdefault(shard.store, []).append(shard)
    return {
        f"{stem}.safetensors.index.json": _index(own, prefix) for (prefix, stem), own in found.items() if len(own) > 1
    }


def _index(shards: Sequence[Shard], prefix: str) -> str:
    """Which shard holds a tensor, and the bytes of all of them."""
    weight_map = {n.removeprefix(prefix): shard.name.rpartition("/")[2] for shard in shards for n in shard.keys}
    total = sum(key.nbytes for shard in shards for key in shard.keys.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def layout_digest(shards: Sequence[Shard]) -> str:
    """A checksum over the names and headers of all shards."""
    digest = xxhash.xxh3_128()
    for shard in shards:
        digest.update(shard.name.encode() + b"\0" + shard.header)
    return digest.hexdigest()
