"""Small things that every writer needs: error texts, whole writes, durable folders, readable sizes."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightsmith.core.errors import OutputError
from weightsmith.io import system

__all__ = [
    "WriteOut",
    "allocate",
    "allocated",
    "files_in",
    "gigabytes",
    "pwrite_all",
    "remove",
    "replace_file",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "write_all",
    "write_file",
    "writing",
]  # fmt: skip

_AGAIN = "then run again, with --resume if the command knows it"
_FREE_SPACE = f"free some space, {_AGAIN}"
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
        advice = _ADVICE.get(error.errno or 0, f"check the disk, {_AGAIN}")
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_file(path: Path, data: str | bytes | Iterable[bytes]) -> Path:
    """Write one file, parents included (text as UTF-8 with Unix line ends on every system).

    `data` may come in blocks, so that a large file is never in memory as a whole.
    """
    blocks = [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data
    with writing(path):
        system.call(path.parent.mkdir, parents=True, exist_ok=True)
        descriptor = system.call(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for block in blocks:
                write_all(descriptor, block)
        finally:
            os.close(descriptor)
    return path


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> Path:
    """Write one file in one visible step; it is on the disk before it has its name, so that no power cut empties it."""
    staged = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            write_file(staged, data)
            sync_file(staged)
            system.call(staged.replace, path)
        except BaseException:
            with suppress(OSError):  # there is an error to report already
                remove(staged)
            raise
    return path


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of a buffer at an offset; one pwrite may take less than it was given (2 GiB at most on Linux)."""
    view = memoryview(data)
    while view.nbytes:
        count = _some(system.call(os.pwrite, descriptor, view, offset))
        view, offset = view[count:], offset + count


_WRITE = 2  # SYNC_FILE_RANGE_WRITE


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


class WriteOut:
    """Lets the system begin to write new pages to the disk, so that the last sync has little left to wait for.

    A hint: it promises nothing, and where the system does not know it nothing happens.
    """

    STEP = 32 << 20

    def __init__(self) -> None:
        self._waiting = 0

    def add(self, descriptor: int, nbytes: int) -> None:
        """So much was written to a file.  Threads may interleave here: then the hint comes a little early or late."""
        self._waiting += nbytes
        begin = _sync_file_range()
        if self._waiting >= self.STEP and begin is not None:
            self._waiting = 0
            begin(descriptor, 0, 0, _WRITE)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of a buffer where the file stands (at its end, if it was opened to append)."""
    view = memoryview(data)
    while view.nbytes:
        view = view[_some(system.call(os.write, descriptor, view)) :]


def _some(count: int) -> int:
    if count == 0:  # the disk takes nothing and does not say why; trying for ever is no answer
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return count


def allocate(descriptor: int, size: int) -> None:
    """Reserve the space now, so that a full disk shows before the work and not after it."""
    try:
        system.call(os.posix_fallocate, descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        system.call(os.ftruncate, descriptor, size)


def allocated(folder: Path) -> int:
    """Bytes of the disk that a folder's files take."""
    return sum(path.lstat().st_blocks * 512 for path in system.call(list, folder.rglob("*")))


def sync_file(path: Path, flags: int = 0) -> None:
    """Make a file's data durable."""
    descriptor = system.call(os.open, path, os.O_RDONLY | flags)
    try:
        system.call(os.fsync, descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a file's own fsync does not)."""
    sync_file(folder, os.O_DIRECTORY)


def files_in(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those inside it, by name."""
    for name in sorted(system.call(os.listdir, folder)):
        path = folder / name
        yield from files_in(path) if path.is_dir() else [path]


def sync_tree(folder: Path) -> None:
    """Make a folder with all that is in it durable."""
    folders = {folder}
    for path in files_in(folder):
        sync_file(path)
        folders.update(parent for parent in path.parents if parent.is_relative_to(folder))
    for each in sorted(folders):
        sync_folder(each)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; what is not there is removed already."""
    if path.is_dir() and not path.is_symlink():
        for name in sorted(system.call(os.listdir, path)):
            remove(path / name)
        system.call(path.rmdir)
    else:
        system.call(path.unlink, missing_ok=True)


def gigabytes(count: int) -> str:
    """4_200_000_000 -> '4.20 GB'."""
    return f"{count / 1e9:.2f} GB"
