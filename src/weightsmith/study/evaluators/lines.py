"""JSON lines, read strictly: a line that lacks a field is named, nothing is left out in silence."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from weightsmith.core.errors import SourceError, did_you_mean
from weightsmith.io import system
from weightsmith.io.read.small import json_lines

__all__ = ["read_lines", "rows", "texts"]

T = TypeVar("T")


def read_lines(file: Path, limit: int | None = None) -> list[Mapping[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file, the first `limit`.

    Raises SourceError for what cannot be read, a line that is no object, and a file without any.
    """
    try:
        data = system.read_file(file)
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: not readable as UTF-8 text ({error})") from None
    found: list[Mapping[str, Any]] = []
    for place, item in itertools.islice(json_lines(text, file), limit):
        if not isinstance(item, dict):
            raise SourceError(f"{place}: should be an object, is {type(item).__name__}")
        found.append(item)
    if not found:
        raise SourceError(f"{file}: no example in it")
    return found


def rows(file: Path, limit: int | None, make: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """`make` of every object; what it raises (KeyError, ValueError) is told with file and number."""
    made = []
    for number, item in enumerate(read_lines(file, limit), 1):
        try:
            made.append(make(item))
        except KeyError as error:
            hint = did_you_mean(str(error.args[0]), item)
            raise SourceError(f"{file}, example {number}: has no {error.args[0]!r}{hint}") from None
        except ValueError as error:
            raise SourceError(f"{file}, example {number}: {error}") from None
    return made


def texts(item: Mapping[str, Any], *names: str) -> str:
    """The first of some fields that is there, as text; KeyError if none is, ValueError if it is no text."""
    name = next((name for name in names if name in item), None)
    if name is None:
        raise KeyError(names[0])
    if not isinstance(item[name], str):
        raise ValueError(f"{name} should be a text, is {type(item[name]).__name__}")
    return str(item[name])
