"""The one door to the file system.

Whatever opens, lists, reads, writes, renames or removes files goes through `call`.  Tests replace it: one makes
each call of a run fail, fall short, or be the last before a kill; another sees that nothing goes past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = ["call", "read_blocks", "read_file"]

_BLOCK = 1 << 20

P = ParamSpec("P")
R = TypeVar("R")


def call(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """function(*args, **kwargs).  Always used as `system.call`, so that a replacement is seen."""
    return function(*args, **kwargs)


def read_file(path: Path, limit: int = -1) -> bytes:
    """The bytes of a small file, or its first `limit`; OSError as it comes."""
    return b"".join(read_blocks(path, limit))


def read_blocks(path: Path, limit: int = -1) -> Iterator[bytes]:
    """The bytes of a file of any size, or its first `limit`, a block after the other; OSError as it comes."""
    with call(path.open, "rb", buffering=0) as file:
        while limit and (got := call(file.read, _BLOCK if limit < 0 else min(_BLOCK, limit))):
            limit -= len(got) if limit > 0 else 0
            yield got
