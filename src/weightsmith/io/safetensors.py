"""The safetensors format, read strictly and without any library.

A file is: 8 bytes little-endian header length, a JSON object, the tensors' bytes.  The object maps each
name to {"dtype", "shape", "data_offsets"}, and optionally `__metadata__` to strings.  Whatever the
reference implementation refuses is refused here, and besides: repeated names, unknown fields.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from weightsmith.errors import SourceError
from weightsmith.io.files import File
from weightsmith.io.small import short
from weightsmith.io.source import Source
from weightsmith.keys import DTYPES, Key, good_name

__all__ = ["MAX_HEADER", "MAX_PARTS", "Header", "Place", "SafetensorsSource", "parse_header", "parse_length",
           "read_header"]  # fmt: skip

MAX_HEADER = 100_000_000
"""Largest header in bytes, as in the reference implementation."""

MAX_PARTS = 4_000_000
"""Most commas and opening brackets in a header, good for 400,000 tensors.  It bounds time and memory of parsing:
100 MB of '{},{},{}' would become more than 3 GB of Python objects."""

_BY_CODE = {dtype.code: dtype for dtype in DTYPES.values()}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_LARGEST = 2**63 - 1


class Place(NamedTuple):
    """A tensor in a file: what it is, and the position of its first byte in the file."""

    key: Key
    offset: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    tensors   name -> Place, in the order of the data
    metadata  the strings under `__metadata__`
    size      bytes before the data (length field and JSON)
    digest    xxh3 of the JSON's bytes
    """

    tensors: Mapping[str, Place]
    metadata: Mapping[str, str]
    size: int
    digest: str

    @cached_property
    def keys(self) -> dict[str, Key]:
        return {name: place.key for name, place in self.tensors.items()}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied tensors that `safetensors.torch.save_model` left out, as it notes them: left-out name -> kept name."""
        return {name: kept for name, kept in self.metadata.items() if name not in self.tensors and kept in self.tensors}


def parse_length(first: bytes, file_size: int, label: str) -> int:
    """Return the JSON's length from a file's first 8 bytes."""
    if file_size < 8 or len(first) < 8:
        raise SourceError(f"{label}: not a safetensors file ({file_size} bytes is too short for a header)")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER:
        raise SourceError(f"{label}: not a safetensors file (its header would be {length} bytes; limit {MAX_HEADER})")
    if 8 + length > file_size:
        raise SourceError(f"{label}: truncated in its header ({file_size} bytes, the header alone needs {8 + length})")
    return length


def parse_header(raw: bytes, file_size: int, label: str) -> Header:
    """Check the JSON of a file of `file_size` bytes and return what it describes; `label` names it in errors."""
    try:
        if raw[:1] != b"{":
            raise _HeaderError("the header is not a JSON object")
        if (count := sum(map(raw.count, (b",", b"{", b"[")))) > MAX_PARTS:
            raise _HeaderError(f"the header is made of {count} parts (limit {MAX_PARTS}); no model has so many tensors")
        fields = _object(json.loads(raw.decode("utf-8"), object_pairs_hook=_Pairs, **_NUMBERS), "the header")
        metadata = _metadata(fields.pop("__metadata__", None))
        found = [_place(name, entry) for name, entry in fields.items()]
        for name, kept in metadata.items():
            if kept in fields and name not in fields:
                _name(name)  # it will be listed as tied to `kept`
        _check_cover(found, file_size - 8 - len(raw))
    except _HeaderError as error:
        raise SourceError(f"{label}: {error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of absurd length or depth
        raise SourceError(
            f"{label}: the safetensors header is not valid JSON ({type(error).__name__}: {error})"
        ) from None
    start = 8 + len(raw)
    found.sort(key=lambda place: (place.offset, place.key.nbytes))
    return Header(
        tensors={place.key.name: Place(place.key, start + place.offset) for place in found},
        metadata=metadata,
        size=start,
        digest=xxhash.xxh3_64_hexdigest(raw),
    )


def read_header(path: str | Path | File) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read."""
    file = path if isinstance(path, File) else File(path)
    length = parse_length(file.read(0, min(8, file.size)).tobytes(), file.size, str(file.path))
    return parse_header(file.read(8, length, "header").tobytes(), file.size, str(file.path))


class SafetensorsSource(Source):
    """One safetensors file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.label = str(path)
        self._file = File(self.path)
        self.header = read_header(self._file)
        self.keys = self.header.keys
        self.aliases = self.header.aliases
        if (self.path.parent / "config.json").is_file():
            self.folder = self.path.parent

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        key, offset = self.header.tensors[self.key(name).name]
        unsigned = _UNSIGNED[DTYPES[key.dtype].itemsize]
        if not key.shape:
            return self._file.read(offset, key.nbytes, repr(name)).view(unsigned).reshape(())
        first, last, _ = slice(start, stop).indices(key.rows)
        rows = max(last - first, 0)
        pitch = key.row_numel * DTYPES[key.dtype].itemsize
        data = self._file.read(offset + first * pitch, rows * pitch, repr(name))
        return data.view(unsigned).reshape(rows, *key.shape[1:])

    def fingerprint(self) -> dict[str, Any]:
        self._file.refuse_changed()
        noted = {"size": self._file.size, "mtime_ns": self._file.mtime_ns, "header": self.header.digest}
        return {"files": {self.path.name: {**noted, "sample": self._file.sample()}}}


# --- the parts of a header -------------------------------------------------------------------------


class _HeaderError(Exception):
    """What is wrong with a header; `parse_header` adds where."""


class _Pairs(list):
    """A JSON object as its pairs in file order, so that repeated names are seen."""


def _integer(digits: str) -> int:
    if digits.startswith("-"):
        raise _HeaderError(f"the header holds the negative number {digits[:24]}")
    return int(digits)


def _constant(word: str) -> None:
    raise _HeaderError(f"the header holds {word}, which JSON does not know")


_NUMBERS: dict[str, Any] = {"parse_int": _integer, "parse_constant": _constant}


def _text(value: object) -> str:
    """A string that has a UTF-8 form (JSON escapes can spell halves of characters)."""
    if not isinstance(value, str):
        raise _HeaderError(f"the header holds {short(value)} where a string belongs")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _HeaderError(f"the name {short(value)} is not valid Unicode") from None
    return value


def _name(text: str) -> str:
    if not good_name(text):
        raise _HeaderError(f"{short(text)} is no name for a tensor (control characters, or too long)")
    return text


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, _Pairs):
        raise _HeaderError(f"{what} is {short(value)}, not a JSON object")
    result: dict[str, Any] = {}
    for name, entry in value:
        if _text(name) in result:
            raise _HeaderError(f"{what} names {short(name)} twice")
        result[name] = entry
    return result


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    fields = _object(value, "__metadata__")
    for name, text in fields.items():
        if not isinstance(text, str):
            raise _HeaderError(f"__metadata__ {short(name)} is {short(text)}, not a string")
        _text(text)
    return fields


def _place(name: str, value: object) -> Place:
    """Check one tensor's entry; the offset is still that within the data."""
    entry = _object(value, f"the entry of {_name(name)!r}")
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{name!r} has the fields {short(sorted(entry))}, not dtype, shape and data_offsets")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BY_CODE:
        raise _HeaderError(
            f"{name!r} has dtype {short(code)}, which cannot be read; known: {', '.join(sorted(_BY_CODE))}"
        )
    if not _integers(shape):
        raise _HeaderError(f"{name!r} has shape {short(shape)}, not a list of whole numbers")
    if not _integers(span) or len(span) != 2 or span[0] > span[1]:
        raise _HeaderError(f"{name!r} has data_offsets {short(span)}, not [begin, end]")
    itemsize = _BY_CODE[code].itemsize
    if len(shape) > 64 or not _fits(shape, itemsize):  # NumPy and torch know 64 axes
        raise _HeaderError(f"{name!r} has shape {short(shape)}, which no tensor can have")
    key = Key(name, tuple(shape), _BY_CODE[code].name)
    if key.nbytes != span[1] - span[0]:
        raise _HeaderError(f"{name!r} has {span[1] - span[0]} bytes of data, but {code} {shape} needs {key.nbytes}")
    return Place(key, span[0])


def _check_cover(places: list[Place], data_size: int) -> None:
    """The tensors must fill the data exactly: in order, no overlap, no hole, nothing behind."""
    at, before = 0, ""
    for key, offset in sorted(places, key=lambda place: (place.offset, place.key.nbytes)):
        if offset < at:
            raise _HeaderError(f"{key.name!r} overlaps {before!r} (it begins at {offset}, {before!r} ends at {at})")
        if offset > at:
            raise _HeaderError(f"{key.name!r} begins at {offset}, but the data before it ends at {at}")
        at, before = offset + key.nbytes, key.name
    if at > data_size:
        raise _HeaderError(f"truncated: {before!r} ends at byte {at} of the data, but only {data_size} bytes are there")
    if at < data_size:
        raise _HeaderError(f"{data_size - at} bytes follow the last tensor that belong to none")


def _fits(shape: list[int], itemsize: int) -> bool:
    """Whether the size fits 63 bits, zero-length axes left out (NumPy and torch need that too)."""
    return math.prod(n for n in shape if n) * itemsize <= _LARGEST


def _integers(value: object) -> bool:
    return isinstance(value, list) and not isinstance(value, _Pairs) and all(type(n) is int for n in value)
