"""Small files beside the weights (configs, indexes, manifests): read whole, within a limit, and strictly as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io.read.files import File, Ranged

__all__ = ["MAX_VALUES", "json_lines", "parse_json", "read_json", "read_small", "refuse_above", "short", "word"]

MAX_VALUES = 8_000_000
"""Most commas and opening brackets in a JSON text; the largest tokenizers have about two million.  It bounds time and
memory of parsing: 100 MB of '{},{},{}' would become more than 3 GB of Python objects."""


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; SourceError if it is none (a pipe, a device), cannot be read or is above `limit`."""
    file = File(path)
    return file.read(0, refuse_above(file, limit)).tobytes()


def refuse_above(file: Ranged, limit: int) -> int:
    """The size of a file; SourceError if it is above `limit`."""
    if file.size > limit:
        raise SourceError(f"{file.path}: {file.size} bytes, but at most {limit} are read of such a file")
    return file.size


def read_json(path: Path, limit: int) -> Any:
    """The value in a small JSON file; see `parse_json`."""
    return parse_json(read_small(path, limit), str(path))


def parse_json(raw: bytes, label: str) -> Any:
    """The value of a JSON text in UTF-8; SourceError for bad syntax and repeated names (parsers read them unlike)."""
    if sum(map(raw.count, (b",", b"{", b"["))) > MAX_VALUES:
        raise SourceError(f"{label}: more than {MAX_VALUES:,} values, which no file of its kind has")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unrepeated)
    except _RepeatedError as error:
        raise SourceError(f"{label}: names {short(error.args[0])} twice") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{label}: not valid JSON ({type(error).__name__}: {error})") from None


def json_lines(text: str, label: object) -> Iterator[tuple[str, Any]]:
    """(place for messages, value) of every line of a JSON-lines text that is not empty.

    Lines end at line feeds only: other separators may stand in a text.  SourceError for bad syntax, with the line.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{label}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{place}: not valid JSON ({error})") from None
        yield place, value


def short(value: object) -> str:
    """A value from a file in at most 80 plain characters, for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def word(name: str) -> str:
    """A name from a file as it is, if it is short and plain."""
    return name if name.isprintable() and 0 < len(name) <= 80 else short(name)


class _RepeatedError(Exception):
    pass


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _RepeatedError(name)
        found[name] = value
    return found
