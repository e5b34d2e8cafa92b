"""Plain reads of byte ranges: the one place through which weight files are read.

`preadv` into fresh memory, not mmap: resident memory stays what the caller holds, a file that
shrinks gives an error instead of SIGBUS, and network file systems are not read page by page.

Tensors are read in blocks, one after the other.  The kernel is told what comes next (`posix_fadvise`), so that the
disk works on it while this block is merged.  What lies in memory already is not asked for: looking costs two calls of
a microsecond for some megabytes, the advice a thousand times as much.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.core.errors import SourceError
from weightsmith.io import system

if TYPE_CHECKING:
    from weightsmith.io.url import Url

__all__ = ["File", "Ranged", "preadv"]

_BLOCK = 8 << 20  # bytes per read of a file that is hashed
_SAMPLES, _SAMPLE = 8, 8192  # how many pieces stand for a file, and their bytes
_AHEAD = 8 << 20  # bytes behind a block that the disk is asked for
_MOST_IDLE = 64  # descriptors kept open between reads; hundreds of shards must not meet the process's limit


def preadv(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into `buffer` from `offset`; returns the bytes read.  Fault tests replace this function."""
    return system.call(os.preadv, fd, [buffer], offset)


def _in_memory(fd: int, offset: int) -> bool:
    """Whether the page cache holds this byte of a file, so that reading it would not wait."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return system.call(os.preadv, fd, [memoryview(bytearray(1))], offset, os.RWF_NOWAIT) > 0
    except OSError:  # EAGAIN: it does not; EOPNOTSUPP: the file system cannot tell
        return False


class _Idle:
    """Open descriptors that nobody reads from right now, the longest unused first.

    A reader takes one out (so that every thread has its own, with its own read-ahead) and puts it back.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start empty (in a forked child, whose lock may be held by a thread that does not exist there)."""
        self._lock = threading.Lock()
        self._owner: OrderedDict[int, int] = OrderedDict()  # descriptor -> number of its File
        self._dead: deque[int] = deque()  # numbers of Files that are gone

    def take(self, owner: int) -> int | None:
        with self._lock:
            for fd in reversed(self._owner):
                if self._owner[fd] == owner:
                    del self._owner[fd]
                    return fd
        return None

    def put(self, owner: int, fd: int) -> None:
        with self._lock:
            self._owner[fd] = owner
            self._bury()
            while len(self._owner) > _MOST_IDLE:
                os.close(self._owner.popitem(last=False)[0])

    def drop(self, owner: int) -> None:
        """Close what belongs to a File that is gone.

        The garbage collector calls this at any moment, also while this thread holds the lock:
        then the next `put` does it.
        """
        self._dead.append(owner)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dead:
            owner = self._dead.popleft()
            for fd in [fd for fd, who in self._owner.items() if who == owner]:
                del self._owner[fd]
                os.close(fd)


_idle = _Idle()
_numbers = itertools.count()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.forget)


class Ranged(ABC):
    """A file to read ranges from, here or elsewhere: any number of threads, picklable.

    path   how messages call it
    size   bytes
    """

    path: Path | Url
    size: int
    _sample: str | None = None

    @abstractmethod
    def read(self, offset: int, count: int, what: str = "", into: np.ndarray | None = None) -> np.ndarray:
        """Return `count` bytes from `offset` as uint8, in memory of their own or in `into`, uint8 [count]; no others.

        `what` names the part being read (a tensor) in errors: a file that ends too early, an I/O error,
        a file changed since it was first looked at.
        """

    @abstractmethod
    def read_on(self, offset: int, count: int, what: str = "", into: np.ndarray | None = None) -> np.ndarray:
        """`read`, where what follows will be asked for next: more may be fetched than is returned."""

    @abstractmethod
    def refuse_changed(self) -> None:
        """Raise SourceError if the file is no longer the one that this was made from."""

    @abstractmethod
    def stamp(self) -> dict[str, Any]:
        """What tells this state of the file from others, beside its size: plain JSON values."""

    @property
    @abstractmethod
    def location(self) -> Path:
        """What stands for it among paths, see `Origin.locations`."""

    def outside(self, offset: int, count: int, place: str) -> None:
        """Raise SourceError for a range that is not in the file."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise SourceError(
                f"{place}bytes {offset} to {offset + count} lie outside the file ({self.size} bytes); it is truncated"
            )

    def digest(self, offset: int = 0, count: int | None = None) -> str:
        """xxh3 (128 bits) of `count` bytes from `offset`, or of the whole file; read in blocks."""
        end = self.size if count is None else offset + count
        state = xxhash.xxh3_128()
        for begin in range(offset, end, _BLOCK):
            state.update(self.read(begin, min(_BLOCK, end - begin)).data)
        return state.hexdigest()

    def sample(self) -> str:
        """xxh3 of a small file, or of 8 pieces of a large one, spread from its first byte to its last.

        Two trainings of one model agree in size and header, but hardly in all of these.  Taken once.
        """
        if self._sample is None:
            self._sample = self._sampled()
        return self._sample

    def _sampled(self) -> str:
        if self.size <= _SAMPLES * _SAMPLE:
            return xxhash.xxh3_64_hexdigest(self.read(0, self.size).data)
        state = xxhash.xxh3_64()
        for i in range(_SAMPLES):
            state.update(self.read((self.size - _SAMPLE) * i // (_SAMPLES - 1), _SAMPLE).data)
        return state.hexdigest()


class File(Ranged):
    """A file to read ranges from: any number of threads, opened when needed, picklable.

    Its size and modification time are noted on creation; a file that was exchanged or rewritten
    since then is refused, because the offsets read from its header may no longer hold.  Reading sees that
    when it opens the file; `refuse_changed` looks for it at any time.
    """

    path: Path
    _asked: dict[int, int]
    """Thread -> up to where it has asked the disk ahead."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            status = system.call(self.path.stat)
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise SourceError(f"{self.path}: cannot be read ({_reason(error)})") from None
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{self.path}: not a regular file")
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self._inode: tuple[int, int] | None = (status.st_dev, status.st_ino)
        self._asked = {}
        self._number = next(_numbers)
        weakref.finalize(self, _idle.drop, self._number)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "mtime_ns": self.mtime_ns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._inode = self._sample = None
        self._asked = {}
        self._number = next(_numbers)
        weakref.finalize(self, _idle.drop, self._number)

    def read(self, offset: int, count: int, what: str = "", into: np.ndarray | None = None) -> np.ndarray:
        place = f"{self.path}: {what}: " if what else f"{self.path}: "
        self.outside(offset, count, place)
        data = np.empty(count, np.uint8) if into is None else into
        if not count:
            return data
        view = data.data
        done = 0
        try:
            with self._descriptor(place) as fd:
                while done < count:
                    got = preadv(fd, view[done:], offset + done)
                    if got <= 0:
                        raise SourceError(f"{place}the file ends {count - done} bytes early; it was cut while in use")
                    done += got
        except OSError as error:
            raise SourceError(f"{place}reading {count} bytes at {offset} failed ({_reason(error)})") from None
        return data

    def read_on(self, offset: int, count: int, what: str = "", into: np.ndarray | None = None) -> np.ndarray:
        self._announce(offset, offset + count)
        return self.read(offset, count, what, into)

    def _announce(self, begin: int, end: int) -> None:
        """Let the system begin to read what follows a block, unless it was asked for that before."""
        thread = threading.get_ident()
        asked = self._asked.get(thread, 0)
        near = begin <= asked <= end + 2 * _AHEAD
        if (near and asked >= min(end + _AHEAD // 2, self.size)) or not hasattr(os, "posix_fadvise"):
            return
        start = max(end, asked) if near else end
        stop = min(end + _AHEAD, self.size)
        if len(self._asked) > _MOST_IDLE:
            self._asked.clear()  # of threads that are gone
        self._asked[thread] = stop
        if stop > start:
            with contextlib.suppress(OSError, SourceError), self._descriptor("") as fd:  # advice only; `read` complains
                if not (_in_memory(fd, start) and _in_memory(fd, stop - 1)):
                    system.call(os.posix_fadvise, fd, start, stop - start, os.POSIX_FADV_WILLNEED)

    @property
    def location(self) -> Path:
        return self.path

    def stamp(self) -> dict[str, Any]:
        return {"mtime_ns": self.mtime_ns, "sample": self.sample()}

    def refuse_changed(self) -> None:
        """Raise SourceError if the file at the path is no longer the one that this was made from.

        What a program changed without touching size and modification time is not seen.
        """
        try:
            now = system.call(self.path.stat)
        except OSError as error:
            raise SourceError(f"{self.path}: has gone since it was opened ({_reason(error)}); start again") from None
        same = (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)
        # Another process may see the file under other numbers (a network disk), so they are not taken along there.
        if not same or self._inode not in (None, (now.st_dev, now.st_ino)):
            raise SourceError(f"{self.path}: was changed or exchanged since it was opened; start again")

    @contextlib.contextmanager
    def _descriptor(self, place: str) -> Iterator[int]:
        fd = _idle.take(self._number)
        if fd is None:
            fd = self._open(place)
        try:
            yield fd
        except BaseException:
            os.close(fd)
            raise
        _idle.put(self._number, fd)

    def _open(self, place: str) -> int:
        fd = system.call(os.open, self.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            os.close(fd)
            raise SourceError(f"{place}the file has changed since it was opened; start again")
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return fd


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
