"""The one door to the file system.

Whatever opens, lists, reads, writes, renames or removes files goes through `call`.  Tests replace it: one makes
each call of a run fail, fall short, or be the last before a kill; another sees that nothing goes past it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = ["call", "read_file"]

P = ParamSpec("P")
R = TypeVar("R")


def call(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """function(*args, **kwargs).  Always used as `system.call`, so that a replacement is seen."""
    return function(*args, **kwargs)


def read_file(path: Path, limit: int = -1) -> bytes:
    """The bytes of a small file, or its first `limit`; OSError as it comes."""
    with call(path.open, "rb", buffering=0) as file:
        data = bytearray()
        while limit < 0 or len(data) < limit:
            got = call(file.read, 1 << 20 if limit < 0 else limit - len(data))
            if not got:
                break
            data += got
    return bytes(data)
