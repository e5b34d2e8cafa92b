"""Folders of torch.distributed.checkpoint (`.metadata`, `__0_0.distcp`), read without running any code in them.

`.metadata` is a pickle of torch's own classes.  It is read with stand-ins for those, and for nothing else: a name that
is not among them is refused.  Every part of a tensor is a small archive of `torch.save` inside a `.distcp` file; where
its numbers lie is found from the archive's directory, and rows are then read like those of any other file.
"""

from __future__ import annotations

import io
import math
import pickle
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import DTYPES, Key, good_name
from weightsmith.core.lazy import torch
from weightsmith.io.read.files import File
from weightsmith.io.read.folder import inside
from weightsmith.io.read.pickle import Strided, gather
from weightsmith.io.read.sharded import Piece, fitted
from weightsmith.io.read.small import read_small
from weightsmith.io.read.source import Bits, Origin, Source

__all__ = ["METADATA", "Checkpoint", "DcpSource"]

METADATA = ".metadata"
MOST = 512 << 20
"""Largest `.metadata` that is read; that of a model with 100,000 parts is some 30 MB."""
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "app", "state")
_OTHERS = ("optim", "optimizer", "optimizers", "optim_state", "optimizer_state", "optimizer_state_dict", "scheduler",
           "schedulers", "lr_scheduler", "dataloader", "train_state", "rng_state")  # fmt: skip
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _Record:
    """Stands for an object of torch's: what it was called with, and its fields."""

    fields: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.fields = state

    def get(self, name: str) -> Any:
        return self.fields.get(name) if isinstance(self.fields, Mapping) else None


def _tuple(values: Iterable[Any] = ()) -> tuple[Any, ...]:
    return tuple(values)


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                                     "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"),
}  # fmt: skip


class _Reader(pickle.Unpickler):
    """Makes stand-ins, tuples and words; every other name is refused."""

    def __init__(self, raw: bytes, label: str, more: Mapping[tuple[str, str], Any] | None = None) -> None:
        super().__init__(io.BytesIO(raw))
        self._label, self._more = label, more or {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._more:
            return self._more[module, name]
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return _tuple
        if module == "torch" and name in DTYPES:
            return name
        raise SourceError(f"{self._label}: asks for code ({module}.{name}), which is never run")

    def persistent_load(self, pid: Any) -> Any:
        return pid

    @classmethod
    def read(cls, raw: bytes, label: str, more: Mapping[tuple[str, str], Any] | None = None) -> Any:
        """The value of a pickle; SourceError for whatever is wrong with it."""
        try:
            return cls(raw, label, more).load()
        except SourceError:
            raise
        except Exception as error:  # anything can come out of a broken pickle
            raise SourceError(f"{label}: not readable ({type(error).__name__}: {str(error)[:120]})") from None


@dataclass(frozen=True)
class _Stored:
    """Where a part lies: its file, and its bytes there; `packed` where they were compressed."""

    file: str
    offset: int
    length: int
    packed: bool


class Checkpoint:
    """What a folder holds.

    tensors  full name -> (path in the saved dictionary, dtype, parts, where each lies)
    values   full name -> (path, where it lies) of what is no tensor
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, str(folder)
        raw = read_small(folder / METADATA, MOST)
        root = _Reader.read(raw, f"{self.label}/{METADATA}")
        try:
            self._take(root)
        except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
            raise SourceError(
                f"{self.label}/{METADATA}: not as torch.distributed.checkpoint writes it ({error!r:.120})"
            ) from None
        self._files: dict[str, File] = {}
        self._places: dict[tuple[str, tuple[int, ...]], Strided] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _take(self, root: _Record) -> None:
        planned = root.get("planner_data") or {}
        stored: dict[str, dict[tuple[int, ...] | None, _Stored]] = {}
        for index, info in root.get("storage_data").items():
            place = index.get("offset")
            packed = bool(info.get("transform_descriptors"))
            where = _Stored(str(info.get("relative_path")), int(info.get("offset")), int(info.get("length")), packed)
            stored.setdefault(index.get("fqn"), {})[None if place is None else tuple(place)] = where
        self.tensors: dict[str, tuple[tuple[Any, ...], str, tuple[Piece, ...]]] = {}
        self.values: dict[str, tuple[tuple[Any, ...], _Stored]] = {}
        self._stored: dict[tuple[str, tuple[int, ...]], _Stored] = {}
        for name, about in root.get("state_dict_metadata").items():
            path = planned.get(name) if isinstance(planned, Mapping) else None
            path = tuple(path) if isinstance(path, (tuple, list)) else (name,)
            if about.get("chunks") is None:
                self.values[name] = (path, stored[name][None])
                continue
            fields = about.get("properties").fields
            dtype = fields[0] if isinstance(fields, tuple) else fields["dtype"]
            size, pieces = tuple(about.get("size")), []
            for chunk in about.get("chunks"):
                offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
                lies = stored[name].get(offsets) or (stored[name].get(None) if len(about.get("chunks")) == 1 else None)
                if lies is None:
                    raise SourceError(f"{self.label}: {name!r}: the part at {list(offsets)} lies nowhere")
                self._stored[name, offsets] = lies
                pieces.append(Piece(lies.file, offsets, sizes))
            held = fitted(name, pieces, self.label)
            whole = tuple(max(o + n for o, n in axis) for axis in zip(
                *(list(zip(p.offsets, p.shape, strict=True)) for p in held), strict=True))  # fmt: skip
            if whole != size and math.prod(size):
                raise SourceError(f"{self.label}: {name!r} has shape {list(size)}, its parts make up {list(whole)}")
            self.tensors[name] = (path, str(dtype), held)
        self.shapes = {n: tuple(a.get("size")) for n, a in root.get("state_dict_metadata").items() if a.get("chunks")}

    # -- reading

    @property
    def files(self) -> list[str]:
        """The names of the files with tensors."""
        return sorted({piece.shard for _, _, pieces in self.tensors.values() for piece in pieces})

    def file(self, name: str) -> File:
        with self._lock:
            if name not in self._files:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise SourceError(f"{self.label}/{METADATA}: names {name!r}, outside its folder")
                self._files[name] = File(inside(self.folder, name))
            return self._files[name]

    def rows(self, name: str, piece: Piece, start: int, stop: int) -> np.ndarray:
        """Rows of a part, as unsigned integers: [stop - start, *rest], [] for a 0-dim tensor."""
        unsigned = np.dtype(_UNSIGNED[DTYPES[self.tensors[name][1]].itemsize])
        place = self._place(name, piece)
        shape, offset = piece.shape, place.offset
        if shape:
            shape = (stop - start, *shape[1:])
            offset += start * place.strides[0] * unsigned.itemsize
        return gather(self.file(piece.shard), unsigned, shape, Strided(offset, place.strides), repr(name))

    def value(self, name: str) -> Any:
        """What is no tensor: plain values only, which no code in it may make."""
        _, where = self.values[name]
        raw = self.file(where.file).read(where.offset, where.length, repr(name)).tobytes()
        try:
            return torch.load(io.BytesIO(raw), weights_only=True)
        except Exception as error:
            raise SourceError(f"{self.label}: {name!r} is not a plain value ({type(error).__name__})") from None

    def _place(self, name: str, piece: Piece) -> Strided:
        known = self._places.get((name, piece.offsets))
        if known is None:
            where = self._stored[name, piece.offsets]
            label = f"{self.label}/{where.file}: {name!r}"
            if where.packed:
                raise SourceError(f"{label} was compressed when it was saved; save it without transforms")
            window = _Window(self.file(where.file), where.offset, where.length)
            known = _in_archive(window, piece.shape, self.tensors[name][1], label)
            self._places[name, piece.offsets] = known
        return known


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: File, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > file.size:
            raise SourceError(f"{file.path}: a part at {offset} of {length} bytes lies outside the file")
        self.file, self.offset, self.length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self.length)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        found = self.file.read(self.offset + self._at, count, "").tobytes()
        self._at += count
        return found


def _in_archive(window: _Window, shape: tuple[int, ...], dtype: str, label: str) -> Strided:
    """Where in the file the numbers of the one tensor of an archive lie."""
    try:
        with zipfile.ZipFile(window) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            pickled, data = entries["data.pkl"], entries["data/0"]
            if data.compress_type != zipfile.ZIP_STORED or pickled.file_size > 1 << 20:
                raise SourceError(f"{label}: compressed, as torch.save never does")
            about = _Reader.read(archive.read(pickled), label, _TENSORS)
        window.seek(data.header_offset)
        head = window.read(30)
        start = data.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{label}: not an archive of torch.save ({type(error).__name__}: {error})") from None
    offset, size, strides = about
    itemsize = DTYPES[dtype].itemsize
    last = offset + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    good = size == shape and all(type(s) is int and s >= 0 for s in (offset, *strides))
    count = math.prod(list(shape))
    if not good or (count and (last + 1) * itemsize > data.file_size):
        raise SourceError(f"{label}: its archive holds {list(size)} of other strides or bytes than {METADATA} says")
    if start + data.file_size > window.length:
        raise SourceError(f"{label}: truncated")
    return Strided(window.offset + start + offset * itemsize, strides)


def _rebuilt(storage: Any, offset: int, size: Any, strides: Any, *more: Any) -> Any:
    return offset, tuple(size), tuple(strides)


_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
_TENSORS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): lambda found, *more: found,
    ("collections", "OrderedDict"): dict,
    **{("torch", f"{kind}Storage"): f"{kind}Storage" for kind in _STORAGES},
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
}  # fmt: skip


class DcpSource(Source):
    """The model in a folder of torch.distributed.checkpoint; an optimizer's state beside it is left out."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.checkpoint = Checkpoint(folder)
        names, left = _of_model({n: path for n, (path, _, _) in self.checkpoint.tensors.items()}, str(folder))
        self._names = names
        self.keys = {}
        for name, full in names.items():
            if not good_name(name):
                raise SourceError(f"{folder}: {ascii(name)[:80]} is no name for a tensor")
            self.keys[name] = Key(name, self.checkpoint.shapes[full], self.checkpoint.tensors[full][1])
        files = [folder / file for file in self.checkpoint.files]
        remark = [f"{folder}: left out {len(left)} tensors that are not the model's ({some(left)})"] if left else []
        config = folder if (folder / "config.json").is_file() else None
        self.origin = Origin(
            str(folder), config, tuple(self.checkpoint.files), (folder, folder / METADATA, *files), checkpoint=folder,
            remarks=tuple(remark),
        )  # fmt: skip

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        full = self._names[key.name]
        pieces = self.checkpoint.tensors[full][2]
        first, last, _ = slice(low, high).indices(key.rows)
        shape = (max(last - first, 0), *key.shape[1:]) if key.shape else ()
        out = np.empty(shape, _UNSIGNED[DTYPES[key.dtype].itemsize]) if into is None else into
        if not key.shape:
            out[...] = self.checkpoint.rows(full, pieces[0], 0, 1)
            return Bits(out, key.dtype)
        for piece in pieces:
            start, stop = max(first, piece.offsets[0]), min(last, piece.offsets[0] + piece.shape[0])
            if start >= stop or not math.prod(piece.shape):
                continue
            place = tuple(slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.shape[1:], strict=True))
            rows = self.checkpoint.rows(full, piece, start - piece.offsets[0], stop - piece.offsets[0])
            out[(slice(start - first, stop - first), *place)] = rows
        return Bits(out, key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        found = {}
        for name in (METADATA, *self.checkpoint.files):
            file = File(self.checkpoint.folder / name) if name == METADATA else self.checkpoint.file(name)
            file.refuse_changed()
            found[name] = {"size": file.size, **file.stamp()}
        return {"files": found}


def _of_model(paths: Mapping[str, tuple[Any, ...]], label: str) -> tuple[dict[str, str], list[str]]:
    """Name in the model -> full name; and the full names of tensors that belong to something else."""
    mine = {full: path for full, path in paths.items() if len(path) < 2 or str(path[0]) not in _OTHERS}
    left = [full for full in paths if full not in mine]
    while (tops := {str(path[0]) for path in mine.values()}) and all(len(path) > 1 for path in mine.values()):
        chosen = [top for top in tops if top in _WRAPPERS]
        if len(tops) > 1 and len(chosen) != 1:
            raise SourceError(f"{label}: cannot tell which part is the model ({some(sorted(tops))})")
        top = chosen[0] if chosen else next(iter(tops))
        left += [full for full, path in mine.items() if str(path[0]) != top]
        mine = {full: path[1:] for full, path in mine.items() if str(path[0]) == top}
        mine_others = [full for full, path in mine.items() if len(path) > 1 and str(path[0]) in _OTHERS]
        left += mine_others
        mine = {full: path for full, path in mine.items() if full not in mine_others}
    if not mine:
        raise SourceError(f"{label}: a distributed checkpoint without a model in it")
    return {".".join(map(str, path)): full for full, path in mine.items()}, left
