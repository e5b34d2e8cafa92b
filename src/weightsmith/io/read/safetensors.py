"""The safetensors format, read strictly and without any library.

A file is: 8 bytes little-endian header length, a JSON object, the tensors' bytes.  The object maps each
name to {"dtype", "shape", "data_offsets"}, and optionally `__metadata__` to strings.  Whatever the
reference implementation refuses is refused here, and besides: repeated names, unknown fields.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import DTYPES, Key, good_name
from weightsmith.io.read.files import File, Ranged
from weightsmith.io.read.small import short
from weightsmith.io.read.source import Bits, Source, beside_config

__all__ = ["MAX_HEADER", "MAX_NOTES", "MAX_PARTS", "MAX_WIDE", "Header", "Located", "SafetensorsSource", "count_parts",
           "parse_header", "parse_length", "read_header"]  # fmt: skip

MAX_HEADER = 100_000_000
"""Largest header in bytes, as in the reference implementation."""

MAX_PARTS = 2_000_000
"""Most commas and opening brackets in a header, good for 250,000 tensors.  It bounds time and memory of parsing:
100 MB of '{},{},{}' would become more than 3 GB of Python objects."""

MAX_NOTES = 100_000
"""Most entries of `__metadata__`."""

MAX_WIDE = MAX_HEADER // 4
"""Largest header in bytes that spells characters beyond ASCII: one of them makes four bytes of every other."""

_BY_CODE = {dtype.code: dtype for dtype in DTYPES.values()}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_LARGEST = 2**63 - 1


class Located(NamedTuple):
    """A tensor in a file: what it is, and the position of its first byte in the file."""

    key: Key
    offset: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    tensors   name -> Located, in the order of the data
    metadata  the strings under `__metadata__`
    size      bytes before the data (length field and JSON)
    digest    xxh3 of the JSON's bytes
    """

    tensors: Mapping[str, Located]
    metadata: Mapping[str, str]
    size: int
    digest: str

    @cached_property
    def keys(self) -> dict[str, Key]:
        return {name: tensor.key for name, tensor in self.tensors.items()}

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
        _check_bounds(raw)
        metadata: dict[str, str] = {}
        found: dict[str, Located] = {}
        for name, value in _members(raw.decode("utf-8")):
            if name == "__metadata__":
                metadata = _metadata(value)
            else:
                found[name] = _located(name, value)
        for name, kept in metadata.items():
            if kept in found and name not in found:
                _name(name)  # it will be listed as tied to `kept`
        located = sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.key.nbytes))
        _check_cover(located, file_size - 8 - len(raw))
    except _HeaderError as error:
        raise SourceError(f"{label}: {error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of absurd length or depth
        raise SourceError(
            f"{label}: the safetensors header is not valid JSON ({type(error).__name__}: {error})"
        ) from None
    start = 8 + len(raw)
    return Header(
        tensors={key.name: Located(key, start + offset) for key, offset in located},
        metadata=metadata,
        size=start,
        digest=xxhash.xxh3_64_hexdigest(raw),
    )


def count_parts(raw: bytes) -> int:
    """Commas and opening brackets: no fewer than the values that the JSON holds."""
    return sum(map(raw.count, (b",", b"{", b"[")))


def read_header(path: str | Path | Ranged) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read."""
    file = path if isinstance(path, Ranged) else File(path)
    length = parse_length(file.read(0, min(8, file.size)).tobytes(), file.size, str(file.path))
    return parse_header(file.read(8, length, "header").tobytes(), file.size, str(file.path))


class SafetensorsSource(Source):
    """One safetensors file, on this machine or (a `Ranged` of its own) elsewhere."""

    def __init__(self, path: str | Path | Ranged) -> None:
        self._file = path if isinstance(path, Ranged) else File(path)
        self.path = self._file.location
        label = str(path.path if isinstance(path, Ranged) else path)
        self.header = read_header(self._file)
        self.keys = self.header.keys
        self.aliases = self.header.aliases
        self.origin = beside_config(label, self.path)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key, offset = self.header.tensors[self.key(name).name]
        first, last, _ = slice(low, high).indices(key.rows)
        rows, itemsize = max(last - first, 0), DTYPES[key.dtype].itemsize
        pitch = key.row_numel * itemsize
        memory = None if into is None else into.reshape(-1).view(np.uint8)
        data = self._file.read_on(offset + first * pitch, rows * pitch, repr(name), memory)
        shape = (rows, *key.shape[1:]) if key.shape else ()
        return Bits(data.view(_UNSIGNED[itemsize]).reshape(shape) if into is None else into, key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        self._file.refuse_changed()
        noted = {"size": self._file.size, **self._file.stamp(), "header": self.header.digest}
        return {"files": {self.path.name: noted}}


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


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs, parse_int=_integer, parse_constant=_constant)
_FIELDS = {"dtype", "shape", "data_offsets"}
_SPACE = re.compile(r"[ \t\n\r]*")


def _check_bounds(raw: bytes) -> None:
    """Refuse, at the speed of counting bytes, what would take long or much memory to parse."""
    if raw[:1] != b"{":
        raise _HeaderError("the header is not a JSON object")
    if (count := count_parts(raw)) > MAX_PARTS:
        raise _HeaderError(f"the header is made of {count} parts (limit {MAX_PARTS}); no model has so many tensors")
    if len(raw) > MAX_WIDE and (not raw.isascii() or b"\\u" in raw):
        raise _HeaderError(f"the header has {len(raw)} bytes (limit {MAX_WIDE}, if not all is plain ASCII)")


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """Name and value of each member of the JSON object that is all of `text`, one at a time: the values of a large
    header all at once take several times its size.  Names must not repeat.
    """
    seen: set[str] = set()
    at = _gap(text, 1)
    more = not text.startswith("}", at)
    while more:
        if not text.startswith('"', at):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        name, at = _DECODER.raw_decode(text, at)
        if _text(name) in seen:
            raise _HeaderError(f"the header names {short(name)} twice")
        seen.add(name)
        at = _gap(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        value, at = _DECODER.raw_decode(text, _gap(text, at + 1))
        yield name, value
        at = _gap(text, at)
        more = text.startswith(",", at)
        at = _gap(text, at + 1) if more else at
    if not text.startswith("}", at):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if (at := _gap(text, at + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _gap(text: str, at: int) -> int:
    """The next position that is no white space."""
    found = _SPACE.match(text, at)
    assert found is not None  # it may be empty
    return found.end()


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
        if name in result:
            raise _HeaderError(f"{what} names {short(name)} twice")
        result[name] = entry
    return result


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, _Pairs) and len(value) > MAX_NOTES:
        raise _HeaderError(f"__metadata__ has {len(value)} entries (limit {MAX_NOTES})")
    fields = _object(value, "__metadata__")
    for name, text in fields.items():
        if not isinstance(text, str):
            raise _HeaderError(f"__metadata__ {short(name)} is {short(text)}, not a string")
        _text(name)
        _text(text)
    return fields


def _located(name: str, value: object) -> Located:
    """Check one tensor's entry; the offset is still that within the data."""
    entry = _object(value, f"the entry of {_name(name)!r}")
    if entry.keys() != _FIELDS:
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
    return Located(key, span[0])


def _check_cover(located: list[Located], data_size: int) -> None:
    """The tensors, by offset, must fill the data exactly: no overlap, no hole, nothing behind."""
    at, before = 0, ""
    for key, offset in located:
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
    return isinstance(value, list) and not isinstance(value, _Pairs) and set(map(type, value)) <= {int}
