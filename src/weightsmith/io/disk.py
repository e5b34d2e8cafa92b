"""Small things that every writer needs: error texts, whole writes, durable folders, readable sizes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightsmith.errors import OutputError

__all__ = ["gigabytes", "pwrite_all", "sync_folder", "write_file", "writing"]

_FREE_SPACE = "free some space, then run again with --resume"
_ADVICE = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "no file may be this large here; choose a smaller output.shard_size",
    errno.EMFILE: "too many shards are open at once; choose a larger output.shard_size",
    errno.EACCES: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the path, the cause and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk, then run again with --resume")
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_file(path: Path, data: str | bytes) -> Path:
    """Write one small file, parents included (text as UTF-8 with Unix line ends on every system)."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of a buffer at an offset; one pwrite may take less than it was given (2 GiB at most on Linux)."""
    view = memoryview(data)
    while view.nbytes:
        count = os.pwrite(descriptor, view, offset)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[count:], offset + count


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a file's own fsync does not)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gigabytes(count: int) -> str:
    """4_200_000_000 -> '4.20 GB'."""
    return f"{count / 1e9:.2f} GB"
