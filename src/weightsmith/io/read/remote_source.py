"""Models at URLs: planned from headers that are fetched by ranges, merged by ranges too, never downloaded."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import NoBaseError, SourceError
from weightsmith.io import system
from weightsmith.io.disk import write_file, writing
from weightsmith.io.package.companions import beside_adapter, module_weights
from weightsmith.io.package.manifest import MANIFEST, MOST
from weightsmith.io.read.adapter import CONFIG as ADAPTER_CONFIG
from weightsmith.io.read.adapter import MLX_WEIGHTS
from weightsmith.io.read.folder import INDEX, check_present, choose_weights, join, parse_index, refuse_stale
from weightsmith.io.read.hub import OTHER
from weightsmith.io.read.remote import RemoteFile
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json, refuse_above
from weightsmith.io.read.source import Bits, Origin, Source, stores_of
from weightsmith.io.url import Url, attempt, filesystem, stored_at
from weightsmith.io.write.upload import RUNNING

__all__ = ["RemoteSource", "local_copy", "open_url"]

_WORKERS = 8
_MAX_INDEX = 100_000_000
_AT_ONCE = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "modules.json", "README.md", MANIFEST),
    *("tokenizer.json", "vocab.json", "quantize_config.json"),
)
"""What is fetched before a plan is made: what models are, and how they number their tokens."""
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
_LOOKED_FOR = (
    *(f"{name}{ending}" for name in _WEIGHTS for ending in ("", INDEX)),
    *(*_AT_ONCE, ADAPTER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt"),
    *("chat_template.jinja", "tokenizer.model", "spiece.model", "preprocessor_config.json", "processor_config.json"),
)
"""Names to ask a web server for that lists no folders."""


class RemoteSource(Source):
    """The model in a folder at a URL, or one file (or shard index) of it.

    Listing keys fetches the index, the headers and small companion files, `prepare` the other companions.
    folder   of this machine, temporary: copies of the companions
    """

    def __init__(self, url: Url, names: Mapping[str, int | None], chosen: str, label: str) -> None:
        self.url, self.folder = url, _copies(url)
        self._names = dict(names)
        named = None
        shards = [chosen]
        if chosen.endswith(INDEX):
            raw = _small(url / chosen, _MAX_INDEX)
            named = parse_index(raw, str(url / chosen))
            if not label.endswith(INDEX):  # else it is the index that was asked for
                refuse_stale(chosen, named, names, label)
            shards = sorted(set(named.values()))
            if not url.is_http:  # whose listings may not be whole; a missing shard is found by its header
                check_present(named, names, str(url / chosen))
        with ThreadPoolExecutor(_WORKERS) as pool:
            opened = pool.map(lambda shard: SafetensorsSource(RemoteFile(url / shard)), shards)
            self._parts = dict(zip(shards, opened, strict=True))
        catalogue = join(self._parts, str(url / chosen), named)
        self.keys, self.aliases, self._shard_of, _ = catalogue
        locations, remarks, stores = (url.location, self.folder), catalogue.remarks(), stores_of(chosen)
        self.origin = Origin(label, self.folder, tuple(shards), locations=locations, remarks=remarks, stores=stores)
        _fetch(url, self.folder, [name for name in _AT_ONCE if name in names])

    @property
    def companions(self) -> tuple[str, ...]:
        """The files that go along with the weights."""
        names = [name for name in self._names if not name.startswith((".", "checkpoint-"))]
        kept = module_weights(self.folder, names)
        return tuple(n for n in names if (n in kept or not OTHER.fullmatch(n)) and n not in self.origin.files)

    def prepare(self) -> None:
        _fetch(self.url, self.folder, self.companions)

    def quick(self, name: str) -> bool:
        return False

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        return self._parts[self._shard_of[key.name]].block(key.name, low, high, into)

    def fingerprint(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        with ThreadPoolExecutor(_WORKERS) as pool:
            for found in pool.map(SafetensorsSource.fingerprint, self._parts.values()):
                files.update(found["files"])
        return {"files": files}


def open_url(url: Url, base: Source | None = None) -> Source:
    """Open the model folder, safetensors file, shard index or PEFT folder (which needs `base`) at a URL.

    Errors: SourceError, one line: nothing there, no access, no answer, weights that are no safetensors, an
    output that is not finished; MissingExtra without the package that the scheme needs.
    """
    if url.name.endswith((".safetensors", INDEX)):
        names = _names(url.parent) if url.name.endswith(INDEX) else {}
        return RemoteSource(url.parent, names, url.name, str(url))
    names = _names(url)
    if not names:
        raise SourceError(f"{url}: nothing is there, or nothing that may be seen")
    if MANIFEST not in names and any(name.startswith(f"{RUNNING}/") for name in names):
        raise SourceError(f"{url}: an output that is not finished; run its merge again with --resume")
    if ADAPTER_CONFIG in names:
        return _open_adapter(url, names, base)
    chosen = choose_weights([name for name in names if "/" not in name], str(url))
    if not chosen.removesuffix(INDEX).endswith(".safetensors"):
        raise SourceError(f"{url}: only safetensors are read from elsewhere, not {chosen}; download it first")
    source = RemoteSource(url, names, chosen, str(url))
    if _kind(source.folder) == "codec":
        raise SourceError(f"{url}: a compressed folder; download it first")
    return source


def local_copy(url: Url) -> Path:
    """A folder of this machine with copies of all files at a URL: for what is small (adapters)."""
    names = _names(url)
    if not names:
        raise SourceError(f"{url}: nothing is there, or nothing that may be seen")
    folder = _copies(url)
    _fetch(url, folder, names)
    return folder


def _open_adapter(url: Url, names: Mapping[str, int | None], base: Source | None) -> Source:
    if base is None:
        raise NoBaseError(f"{url}: a LoRA adapter, which needs a base model; give one under `base`")
    from weightsmith.io.read.mlx_lora import read_folder
    from weightsmith.io.read.peft import AdapterSource

    weights = MLX_WEIGHTS if MLX_WEIGHTS in names else "adapter_model.safetensors"
    if weights not in names:
        raise SourceError(f"{url}: has {ADAPTER_CONFIG} but no {weights}; download it first")
    folder = _copies(url)
    small = (name for name in _AT_ONCE if name in names)
    _fetch(url, folder, dict.fromkeys((ADAPTER_CONFIG, *small, *beside_adapter(names))))
    return AdapterSource(read_folder(folder, SafetensorsSource(RemoteFile(url / weights)), str(url)), base)


def _kind(folder: Path) -> object:
    path = folder / MANIFEST
    found = read_json(path, MOST) if path.exists() else None
    return found.get("kind") if isinstance(found, dict) else None


def _names(url: Url) -> dict[str, int | None]:
    """The files in a folder; where a web server lists none, those of the usual names that it has."""
    if not url.is_http:
        return stored_at(url)
    with contextlib.suppress(SourceError):  # no page for a folder is no fault
        if found := stored_at(url):
            return found
    fs, _ = filesystem(url)
    with ThreadPoolExecutor(_WORKERS) as pool:
        there = pool.map(lambda n: attempt(f"{url / n}: asking", SourceError, fs.exists, (url / n).full), _LOOKED_FOR)
        return {name: None for name, found in zip(_LOOKED_FOR, there, strict=True) if found}


def _small(url: Url, limit: int) -> bytes:
    file = RemoteFile(url)
    return file.read(0, refuse_above(file, limit)).tobytes()


def _fetch(url: Url, folder: Path, names: Iterable[str]) -> None:
    """Copy files that are not there yet.  They are small, or go through piece by piece."""

    def one(name: str) -> None:
        target = folder / name
        if not target.exists():
            part = target.with_name(f"{target.name}.part")
            write_file(part, RemoteFile(url / name).blocks()).replace(target)

    with ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(one, names))


_home: dict[int, Path] = {}


def _copies(url: Url) -> Path:
    """The folder of this process for copies from one URL; all of them go when it ends."""
    home = _home.get(os.getpid())
    if home is None:
        with writing(Path(tempfile.gettempdir())):
            home = _home[os.getpid()] = Path(system.call(tempfile.mkdtemp, prefix="weightsmith-"))
        atexit.register(_clear, os.getpid(), home)
    folder = home / hashlib.sha256(url.full.encode()).hexdigest()[:16] / (url.name or "model")
    with writing(folder):
        system.call(folder.mkdir, parents=True, exist_ok=True)
    return folder


def _clear(owner: int, home: Path) -> None:
    if os.getpid() == owner:  # not in a forked child
        system.call(shutil.rmtree, home, ignore_errors=True)
