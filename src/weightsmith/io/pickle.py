"""PyTorch checkpoints (`torch.save`), read without running any code in them."""

from __future__ import annotations

import contextlib
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.errors import SourceError
from weightsmith.io import system
from weightsmith.io.files import File
from weightsmith.io.source import MemorySource, Source
from weightsmith.keys import good_name
from weightsmith.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PICKLES", "PickleSource"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_GLOBAL = re.compile(r"(?:GLOBAL|function|class|import)\s+`?([\w.]+\.[\w.]+)`?")


class PickleSource(Source):
    """A pickled state dict, memory-mapped; `weights_only=True`, always.

    A checkpoint that holds its state dict under 'state_dict', 'model' or 'model_state_dict' is unwrapped
    if exactly one entry can be meant.  `extras` names every entry that is no tensor (epoch, optimizer, ...).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.label = str(path)
        self._file = File(self.path)
        _refuse_archives(self._file)
        tensors, self.extras = _state_dict(_load(self.path), self.label)
        _check_sizes(tensors, self._file.size, self.label)
        self._memory = MemorySource(tensors, self.label)
        self.keys, self.aliases = self._memory.keys, self._memory.aliases
        if (self.path.parent / "config.json").is_file():
            self.folder = self.path.parent

    def __reduce__(self) -> tuple[type[PickleSource], tuple[Path]]:
        return PickleSource, (self.path,)

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._memory.bits(name, start, stop)

    def fingerprint(self) -> dict[str, Any]:
        self._file.refuse_changed()
        # The zip directory at the end holds a checksum of every part.
        tail = min(self._file.size, 65536)
        digest = xxhash.xxh3_64_hexdigest(self._file.read(self._file.size - tail, tail).tobytes())
        size, mtime = self._file.size, self._file.mtime_ns
        return {"files": {self.path.name: {"size": size, "mtime_ns": mtime, "tail": digest}}}


def _refuse_archives(file: File) -> None:
    """Refuse what torch would unpack first: tar files into a folder, compressed parts not at all when mapped."""
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(file.read(0, min(512, file.size)).tobytes(), "utf-8", "surrogateescape")
        raise SourceError(f"{file.path}: a tar archive (PyTorch before 0.1.2); load and save it again with a newer one")
    with contextlib.suppress(OSError, zipfile.BadZipFile, ValueError, NotImplementedError):  # torch says what is wrong
        with system.call(zipfile.ZipFile, file.path) as archive:
            packed = next((e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise SourceError(f"{file.path}: {packed!a} is compressed, as torch.save never does; unpack and repack it")


def _check_sizes(tensors: Mapping[str, Tensor], size: int, label: str) -> None:
    """Refuse tensors of more bytes than the file has: a stride of 0 shows one number any number of times."""
    for name, tensor in tensors.items():
        if tensor.nbytes > size:
            raise SourceError(f"{label}: {name!r} claims {tensor.nbytes} bytes, but the whole file has {size}")


def _load(path: Path) -> Any:
    try:
        # Checkpoints from before torch 1.6 are no zip files and cannot be mapped.
        mapped = system.call(zipfile.is_zipfile, path)
        return system.call(torch.load, path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # Anything at all can come out of a hostile or broken pickle; none of it may reach the user as a traceback.
        text = str(error)
        found = _GLOBAL.search(text) if "eights only" in text else None
        if found:
            raise SourceError(
                f"{path}: the pickle asks for code ({found[1]}), which is never run; "
                "convert it to safetensors where you trust it"
            ) from None
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        raise SourceError(
            f"{path}: not a readable PyTorch checkpoint ({type(error).__name__}: {first[:160]})"
        ) from None


def _state_dict(loaded: Any, label: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a checkpoint, and the names of its other entries."""
    if not isinstance(loaded, Mapping):
        raise SourceError(f"{label}: holds a {type(loaded).__name__}, not a state dict")
    nested = [name for name, value in loaded.items() if isinstance(value, Mapping) and _has_tensors(value)]
    if not nested and _has_tensors(loaded):
        return _split(loaded, "", label)
    if len(nested) == 1 and nested[0] in _WRAPPERS and not _has_tensors(loaded):
        tensors, inner = _split(loaded[nested[0]], f"{nested[0]}.", label)
        return tensors, (*(str(name) for name in loaded if name != nested[0]), *inner)
    found = ", ".join(repr(name) for name in list(loaded)[:8]) or "nothing"
    raise SourceError(f"{label}: cannot tell which entry is the state dict (found {found}); save that one alone")


def _split(entries: Mapping[Any, Any], prefix: str, label: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    tensors: dict[str, Tensor] = {}
    extras: list[str] = []
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor):
            extras.append(f"{prefix}{name}")
        elif not isinstance(name, str):
            raise SourceError(f"{label}: a tensor is stored under {ascii(name)[:80]}, which is not a name")
        elif not good_name(name):
            raise SourceError(f"{label}: {ascii(name)[:80]} is no name for a tensor (control characters, or too long)")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise SourceError(f"{label}: {name!r} is a sparse, quantized or empty-shell tensor, which cannot be merged")
        else:
            tensors[name] = value
    return tensors, tuple(extras)


def _has_tensors(entries: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in entries.values())
