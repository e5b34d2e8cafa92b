"""PyTorch checkpoints (`torch.save`), read without running any code in them."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import DTYPES, good_name
from weightsmith.core.lazy import torch
from weightsmith.io import system
from weightsmith.io.read.files import File
from weightsmith.io.read.source import Bits, MemorySource, Source, beside_config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PICKLES", "PickleSource", "Strided", "gather", "left_out", "load_pickle"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_GLOBAL = r"(?:GLOBAL|function|class|import)\s+`?([\w.]+\.[\w.]+)`?"


class Strided(NamedTuple):
    """Where a tensor lies in a file: the position of its first number, and the steps of its axes in numbers."""

    offset: int
    strides: tuple[int, ...]


class PickleSource(Source):
    """A pickled state dict; `weights_only=True`, always.

    A checkpoint that holds its state dict under one of `_WRAPPERS` (DeepSpeed: 'module') is unwrapped
    if exactly one entry can be meant.  `extras` names every entry that is no tensor (epoch, optimizer, ...).

    PyTorch maps the file to find out where the tensors lie; their bytes are then read like those of any other
    file, because a mapped file that somebody cuts ends the process (SIGBUS) where a read gives an error.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, label = Path(path), str(path)
        self._file = File(self.path)
        _refuse_archives(self._file)
        tensors, self.extras = _state_dict(_load(self.path), label)
        _check_sizes(tensors, self._file.size, label)
        memory = MemorySource(tensors, label)
        self.keys, self.aliases = memory.keys, memory.aliases
        self._spans = _find({name: tensors[name] for name in self.keys}, self.path)
        self._memory = memory if self._spans is None else None
        self._file.refuse_changed()  # what was mapped must be what is read from now on
        self.origin = replace(beside_config(label, self.path), remarks=left_out(self.extras))

    def __reduce__(self) -> tuple[type[PickleSource], tuple[Path]]:
        return PickleSource, (self.path,)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        if self._memory is not None:
            return Bits(self._memory.bits(key.name, low, high), key.dtype)
        assert self._spans is not None
        unsigned = np.dtype(f"u{DTYPES[key.dtype].itemsize}")
        offset, strides = self._spans[key.name]
        shape = key.shape
        if shape:
            first, last, _ = slice(low, high).indices(key.rows)
            shape = (max(last - first, 0), *shape[1:])
            offset += first * strides[0] * unsigned.itemsize
        return Bits(gather(self._file, unsigned, shape, Strided(offset, strides), repr(key.name)), key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        self._file.refuse_changed()
        # The zip directory at the end holds a checksum of every part.
        tail = min(self._file.size, 65536)
        digest = xxhash.xxh3_64_hexdigest(self._file.read(self._file.size - tail, tail).tobytes())
        noted = {"size": self._file.size, "mtime_ns": self._file.mtime_ns, "tail": digest}
        return {"files": {self.path.name: {**noted, "sample": self._file.sample()}}}


def left_out(extras: Sequence[str]) -> tuple[str, ...]:
    """What a plan says about entries that are no tensors."""
    return (f"entries that are no tensors are left out: {some(extras, 5)}",) if extras else ()


def _refuse_archives(file: File) -> None:
    """Refuse what torch would unpack first: tar files into a folder, compressed parts not at all when mapped."""
    import tarfile
    import zipfile

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


def _find(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Strided] | None:
    """Name -> where it lies in the file that PyTorch has mapped.

    None where they lie in memory (files from before PyTorch 1.6), or where the system does not tell what is mapped.
    """
    mapped = _mapped(path)
    spans: dict[str, Strided] = {}
    for name, tensor in tensors.items():
        at = tensor.data_ptr()
        offset = next((at - low for low, high in mapped if low <= at < high), None)
        if offset is None and tensor.numel():
            return None
        spans[name] = Strided(offset or 0, tensor.stride())
    return spans


def _mapped(path: Path) -> list[tuple[int, int]]:
    """(address of the file's first byte, end of the mapping) wherever this process has mapped the file."""
    wanted = str(path.resolve())
    found = []
    try:
        table = system.read_file(Path("/proc/self/maps")).decode(errors="surrogateescape")
    except OSError:
        return []
    for line in table.strip().split("\n"):
        # 7f0e2c000000-7f0e2c021000 rw-p 00000000 00:2a 1234   /models/a/pytorch_model.bin
        addresses, _, offset, _, _, *file = line.split(maxsplit=5)
        if file == [wanted]:
            low, high = (int(address, 16) for address in addresses.split("-"))
            found.append((low - int(offset, 16), high))
    return found


def gather(file: File, unsigned: np.dtype[Any], shape: tuple[int, ...], place: Strided, what: str) -> np.ndarray:
    """The numbers of a tensor in the order of its axes: one read for each run of the file that holds a part of it.

    A tensor saved as it was computed is one run.  Of a transposed one, rows are read out of every column.
    """
    out = np.empty(shape, unsigned)
    if not out.size:
        return out
    steps = place.strides
    outer = [axis for axis in range(1, len(shape)) if shape[axis] > 1 and steps[axis] > steps[0]]
    inner = [axis for axis in range(len(shape)) if axis not in outer]
    extent = sum((shape[axis] - 1) * steps[axis] for axis in inner) + 1
    for index in itertools.product(*(range(shape[axis]) for axis in outer)):
        at = sum(i * steps[axis] for i, axis in zip(index, outer, strict=True))
        data = file.read(place.offset + at * unsigned.itemsize, extent * unsigned.itemsize, what).view(unsigned)
        picked = tuple(index[outer.index(axis)] if axis in outer else slice(None) for axis in range(len(shape)))
        part = np.lib.stride_tricks.as_strided(
            data, [shape[axis] for axis in inner], [steps[axis] * unsigned.itemsize for axis in inner]
        )
        if extent == out.size and part.flags.c_contiguous:
            return part.reshape(shape)
        out[picked] = part
    return out


def load_pickle(path: Path) -> Any:
    """Whatever plain values and tensors a file holds, which no code in it may make.

    Raises SourceError for anything that is not such a file.
    """
    _refuse_archives(File(path))
    return _load(path)


def _load(path: Path) -> Any:
    import zipfile

    try:
        # Checkpoints from before torch 1.6 are no zip files and cannot be mapped.
        mapped = system.call(zipfile.is_zipfile, path)
        return system.call(torch.load, path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # Anything at all can come out of a hostile or broken pickle; none of it may reach the user as a traceback.
        text = str(error)
        found = re.search(_GLOBAL, text) if "eights only" in text else None
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
        elif value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_neg():
            raise SourceError(
                f"{label}: {name!r} is a sparse, quantized, negated or empty-shell tensor, which cannot be merged"
            )
        else:
            tensors[name] = value
    return tensors, tuple(extras)


def _has_tensors(entries: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in entries.values())
