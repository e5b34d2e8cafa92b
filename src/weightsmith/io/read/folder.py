"""A model's folder, as Hugging Face lays it out: one weight file, or shards and their index."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import Key, good_name
from weightsmith.io import system
from weightsmith.io.read.pickle import PICKLES, PickleSource, left_out
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import parse_json, read_small, short
from weightsmith.io.read.source import DIFFUSION, Bits, Origin, Source, stores_of

__all__ = [
    "INDEX",
    "WEIGHTS",
    "Catalogue",
    "FolderSource",
    "check_present",
    "choose_weights",
    "inside",
    "is_inside",
    "join",
    "parse_index",
    "refuse_stale",
    "shard_of",
]  # fmt: skip

_SINGLE = ("model.safetensors", f"{DIFFUSION}.safetensors")
_PICKLED = ("pytorch_model.bin", f"{DIFFUSION}.bin")
INDEX = ".index.json"
_MAX_INDEX = 100_000_000
WEIGHTS = (
    *("safetensors", "bin", "pt", "pth", "ckpt", "msgpack", "h5", "gguf", "ggml"),
    *("onnx", "onnx_data", "pb", "tflite", "ot", "npz", "mlmodel"),
)
"""What the names of files with weights end in, whether they are read here or not."""
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


def choose_weights(names: Iterable[str], label: str) -> str:
    """Return which of a folder's file names is the model: a weight file or a shard index.

    Order: an index of safetensors files, a single one, a lone *.safetensors, then PyTorch pickles.  Beside a single
    file an index has to name that file (`refuse_stale`).
    Errors: none is there; two could be meant (then neither is guessed).
    """
    present = set(names)
    for single in (*_SINGLE, *_PICKLED):
        if single == _PICKLED[0]:
            lone = sorted(n for n in present if n.endswith(".safetensors") and not n.startswith("adapter_"))
            if part := _part(lone):
                raise SourceError(f"{label}: {part}")
            if len(lone) == 1:
                return lone[0]
            if numbered(lone):
                raise SourceError(
                    f"{label}: {len(lone)} shards and no index of them; download them and give the folder"
                )
            if lone:
                raise SourceError(f"{label}: {len(lone)} safetensors files and no index ({some(lone)}); give one file")
        for name in (single + INDEX, single):
            if name in present:
                return name
    wanted = [name for single in (*_SINGLE, *_PICKLED) for name in (single, single + INDEX)]
    looked = f"looked for {', '.join(wanted)} and a single *.safetensors"
    raise SourceError(f"{label}: no model here; {_instead(present, label) or looked}")


def numbered(names: Iterable[str]) -> list[str]:
    """The shards `x-00001-of-00003.safetensors` that are all there and all that is there; else none."""
    names = list(names)
    found = {name: match for name in sorted(names) if (match := _NUMBERED.fullmatch(name))}
    stems = {match["stem"] for match in found.values()}
    whole = [f"{stem}-{i:05d}-of-{len(found):05d}.safetensors" for stem in stems for i in range(1, len(found) + 1)]
    return whole if len(found) > 1 and list(found) == whole and len(found) == len(names) else []


def shard_of(name: str) -> tuple[str, int] | None:
    """What a file's name says that it is a shard of, and of how many; None where it says no such thing."""
    match = _NUMBERED.fullmatch(name)
    return (match["stem"], int(match["count"])) if match else None


def _part(lone: Sequence[str]) -> str:
    """What is missing where all weight files of a folder are shards of one model, but not all of them; else ''."""
    sets = {shard_of(name) for name in lone}
    if len(sets) != 1 or (only := sets.pop()) is None or only[1] <= len(lone):
        return ""
    return f"{len(lone)} of the {only[1]} shards of a model, and no index ({some(list(lone))}); get the others"


def _instead(present: Iterable[str], label: str) -> str:
    """What a folder without a model is, and the command that makes one of it; '' where it is nothing known."""
    for name in sorted(present):
        if name == "model_index.json":
            return "a pipeline of diffusers: download it and give the folder"
        if name.endswith(".distcp"):
            return (
                "a distributed checkpoint, which is made one file by: "
                f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {label} model.pt"
            )
        if name.startswith("pytorch_model_fsdp"):
            made = f"accelerate merge-weights {label}/{name} OUT"
            return f"a sharded checkpoint of accelerate, which is put together by: {made}"
        if re.fullmatch(r"mp_rank_\d+_model_states\.pt", name):
            return f"a checkpoint of DeepSpeed: give {label}/{name}, or of ZeRO-3 what its zero_to_fp32.py writes"
    return ""


def refuse_stale(chosen: str, named: Mapping[str, str], present: Iterable[str], label: str) -> None:
    """Raise where a chosen index lies beside a single file that it does not name; mlx-lm writes one that does."""
    single = chosen.removesuffix(INDEX)
    if single in present and set(named.values()) != {single}:
        raise SourceError(f"{label}: has both {single} and {chosen}; remove the stale one, or give the path of one")


def parse_index(raw: bytes, label: str) -> dict[str, str]:
    """Return tensor name -> shard file name from an index's JSON; every file must be a plain name."""
    index = parse_json(raw, label)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise SourceError(f"{label}: not a shard index (no weight_map in it)")
    for name, file in weights.items():
        if not good_name(name):
            raise SourceError(f"{label}: {short(name)} is no name for a tensor (control characters, or too long)")
        if not isinstance(file, str) or not _plain(file):
            raise SourceError(f"{label}: {name!r} points to {short(file)}, which is not a file name inside the folder")
    return weights


def inside(folder: Path, name: str) -> Path:
    """Return folder/name, or raise if it is a link that leaves the folder.

    The hub cache is the one exception: its snapshots/<commit>/* link to blobs/* of the same repository.
    """
    path = folder / name
    try:
        inner, target = is_inside(folder, name), path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL character
        raise SourceError(f"{path}: cannot be resolved") from None
    if not inner:
        raise SourceError(f"{path}: a link that leaves the folder (to {target}); give the path of the file itself")
    return path


def is_inside(folder: Path, name: str) -> bool:
    """Whether folder/name is, links followed, in the folder (or in the blobs of the hub cache that it belongs to)."""
    home, target = folder.resolve(), (folder / name).resolve()
    snapshots = next((parent for parent in (home, *home.parents) if parent.name == "snapshots"), None)
    allowed = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    return any(target.is_relative_to(place) for place in allowed)


class Listed(Protocol):
    """What a shard must tell of itself."""

    @property
    def keys(self) -> Mapping[str, Key]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...


class Catalogue(NamedTuple):
    """All tensors of a model: their keys, the tied names, the shard that holds each, and those that another shard
    holds in another state, which does not count."""

    keys: dict[str, Key]
    aliases: dict[str, str]
    shard_of: dict[str, str]
    superseded: dict[str, str]

    def remarks(self) -> tuple[str, ...]:
        """What a plan says about shards that supersede others."""
        names = list(self.superseded)
        if not names:
            return ()
        first = names[0]
        where = f"taken from {self.shard_of[first]}, not from {self.superseded[first]}, as the index says"
        return (f"{some(names)}: {where}",)


def check_present(named: Mapping[str, str], present: Iterable[str], label: str) -> None:
    """Raise unless every shard that an index names is there."""
    shards = sorted(set(named.values()))
    missing = sorted(set(shards) - set(present))
    if missing:
        others = numbered(name for name in present if name.endswith(".safetensors") and name not in named.values())
        hint = f"; the folder holds the {len(others)} shards of another index: remove this one" if others else ""
        raise SourceError(f"{label}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}{hint}")


def join(shards: Mapping[str, Listed], label: str, named: Mapping[str, str] | None = None) -> Catalogue:
    """Put the shards' contents together; each tensor in the shard that the index says.

    A tensor may be stored twice where index and transformers agree on the one that counts: the shard that the index
    names is the last of them by name (which is how transformers reads them, one over the other).
    """
    found = Catalogue({}, {}, {}, {})
    for shard in sorted(shards):
        part = shards[shard]
        for name in (*part.keys, *part.aliases):
            if name in found.shard_of:
                if named is None or named.get(name) != shard:
                    raise SourceError(f"{label}: {name!r} is stored twice, in {found.shard_of[name]} and {shard}")
                found.superseded[name] = found.shard_of[name]
            found.shard_of[name] = shard
            found.keys.pop(name, None)
            found.aliases.pop(name, None)
        found.keys.update(part.keys)
        found.aliases.update(part.aliases)
    if named is None:
        return found
    for name, shard in named.items():
        if found.shard_of.get(name) != shard:
            raise SourceError(f"{label}: {name!r} should be in {shard}, but that shard does not hold it")
    unnamed = [name for name in found.keys if name not in named]
    if unnamed:
        raise SourceError(
            f"{label}: does not name {some(unnamed)}, which {found.shard_of[unnamed[0]]} holds; "
            "the shards are not those of this index"
        )
    return found


class FolderSource(Source):
    """The model in a folder, or the one that a given `*.index.json` describes."""

    def __init__(self, path: str | Path) -> None:
        path, label = Path(path), str(path)
        if path.name.endswith(INDEX):
            folder, chosen, shards = path.parent, path.name, []
        else:
            names = _listing(path)
            shards = numbered(n for n in names if n.endswith((".safetensors", INDEX)) and not n.startswith("adapter_"))
            folder, chosen = path, shards[0] if shards else choose_weights(names, label)
        self._parts: dict[str, SafetensorsSource | PickleSource]
        if shards:
            self._parts = {shard: _open(inside(folder, shard)) for shard in shards}
            catalogue = join(self._parts, label)
        elif chosen.endswith(INDEX):
            catalogue = self._open_shards(folder / chosen, path == folder)
        else:
            self._parts = {chosen: _open(inside(folder, chosen))}
            catalogue = join(self._parts, label)
        self.keys, self.aliases, self._shard_of, _ = catalogue
        files = [part.path for part in self._parts.values()]  # the hub's cache links elsewhere
        extras = [extra for part in self._parts.values() if isinstance(part, PickleSource) for extra in part.extras]
        self.origin = Origin(
            label,
            folder,
            files=tuple(self._parts),
            locations=(folder, path, *files),
            checkpoint=folder,
            remarks=(*left_out(extras), *catalogue.remarks()),
            stores=stores_of(chosen),
        )

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        return self._parts[self._shard_of[key.name]].block(key.name, low, high, into)

    def fingerprint(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        for part in self._parts.values():
            files.update(part.fingerprint()["files"])
        return {"files": files}

    def _open_shards(self, index: Path, found: bool) -> Catalogue:
        """`found`: the folder was given, and nobody said that the index is meant."""
        named = parse_index(read_small(inside(index.parent, index.name), _MAX_INDEX), str(index))
        present = _listing(index.parent)
        if found:
            refuse_stale(index.name, named, present, str(index.parent))
        check_present(named, present, str(index))
        self._parts = {shard: _open(inside(index.parent, shard)) for shard in sorted(set(named.values()))}
        return join(self._parts, str(index), named)


def _open(path: Path) -> SafetensorsSource | PickleSource:
    return PickleSource(path) if path.suffix in PICKLES else SafetensorsSource(path)


def _listing(folder: Path) -> list[str]:
    try:
        return system.call(os.listdir, folder)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}: cannot be listed ({getattr(error, 'strerror', None) or error})") from None


def _plain(file: str) -> bool:
    """A file name and nothing else, on any system."""
    return file not in ("", ".", "..") and good_name(file) and not any(c in file for c in "/\\:")
