"""Ranges of files that lie in an object store or on a web server.

Nothing is fetched as a whole.  Headers take exactly the bytes that are asked for.  Tensors are read in blocks of
some hundred kilobytes, one after the other, for which a request each would be waiting most of the time: these go
through pieces of 4 MiB, the next of which are under way while one is worked on.  All pieces of a process together
are bounded.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.io.read.files import Ranged
from weightsmith.io.url import Url, attempt, filesystem, missing

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["HELD", "RemoteFile", "forget"]

PIECE = 4 << 20
HELD = 128 << 20
"""Most bytes of pieces that a process holds, read or under way."""

_MOST = HELD // PIECE
_AHEAD = 3  # pieces under way behind the one that is read
_WORKERS = 8
_STAMPS = ("ETag", "etag", "checksum", "md5", "md5Hash", "contentHash", "oid", "Last-Modified", "LastModified", "mtime",
           "created")  # fmt: skip
"""Under what names fsspec's file systems tell one state of a file from another, the best first."""


class _Pieces:
    """(file, number) -> the piece, done or under way.

    A piece of which the last byte was read is given up first, then the one longest unused; what is only fetched
    ahead never drives out another.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start empty (in a forked child, where neither the threads nor the lock's holder exist)."""
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._spent: set[tuple[str, int]] = set()
        self._pool: ThreadPoolExecutor | None = None

    def get(self, file: str, wanted: int, last: int, fetch: Callable[[int], bytes]) -> bytes:
        """Piece number `wanted` of a file whose last is `last`; `fetch(number)` brings one."""
        with self._lock:
            follows = (file, wanted - 1) in self._held or (file, wanted) in self._held
            future = self._start((file, wanted), fetch)
            for number in range(wanted + 1, min(wanted + _AHEAD, last) + 1) if follows else ():
                if (file, number) not in self._held and len(self._held) >= _MOST and not self._spent:
                    break
                self._start((file, number), fetch)
            self._held.move_to_end((file, wanted))
        try:
            return future.result()
        except BaseException:
            with self._lock:
                self._drop((file, wanted))
            raise

    def spend(self, file: str, number: int) -> None:
        with self._lock:
            if (file, number) in self._held:
                self._spent.add((file, number))

    def _start(self, place: tuple[str, int], fetch: Callable[[int], bytes]) -> Future[bytes]:
        if place not in self._held:
            while len(self._held) >= _MOST:
                self._drop(next(iter(self._spent), None) or next(iter(self._held)))
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor

                self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="weightsmith-fetch")
            self._held[place] = self._pool.submit(fetch, place[1])
        return self._held[place]

    def _drop(self, place: tuple[str, int]) -> None:
        self._held.pop(place, None)
        self._spent.discard(place)


_pieces = _Pieces()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pieces.forget)


def forget() -> None:
    """Give up all pieces that are held."""
    _pieces.forget()


class RemoteFile(Ranged):
    """A file at a URL.  A request that fails is sent again a few times; one that fails for good is a SourceError."""

    path: Url

    def __init__(self, url: Url) -> None:
        self.path = url
        info = self._info()
        if info.get("type") == "directory" or not isinstance(info.get("size"), int):
            raise SourceError(f"{url}: not a file of a stated size")
        self.size: int = info["size"]
        self._stamp = _stamp_of(info)
        if url.is_http:
            self._refuse_whole_files(info)

    def read(self, offset: int, count: int, what: str = "", into: np.ndarray | None = None) -> np.ndarray:
        place = self._place(what)
        self.outside(offset, count, place)
        data = np.empty(count, np.uint8) if into is None else into
        data[:] = np.frombuffer(self._range(place, offset, count), np.uint8)
        return data

    def read_on(self, offset: int, count: int, what: str = "", into: np.ndarray | None = None) -> np.ndarray:
        place = self._place(what)
        self.outside(offset, count, place)
        data, end = np.empty(count, np.uint8) if into is None else into, offset + count
        for number in range(offset // PIECE, -(-end // PIECE) if count else 0):
            begin = number * PIECE
            try:
                piece = _pieces.get(self._name, number, (self.size - 1) // PIECE, self._piece)
            except SourceError as error:  # it was fetched for this tensor, or ahead of it for another
                raise SourceError(f"{place}{str(error).removeprefix(self._place(''))}") from None
            low, high = max(begin, offset), min(begin + len(piece), end)
            data[low - offset : high - offset] = np.frombuffer(piece, np.uint8)[low - begin : high - begin]
            if high == begin + len(piece):
                _pieces.spend(self._name, number)
        return data

    def refuse_changed(self) -> None:
        fs, path = filesystem(self.path)
        fs.invalidate_cache(path)
        info = self._info()
        if (info.get("size"), _stamp_of(info)) != (self.size, self._stamp):
            raise SourceError(f"{self.path}: was changed or exchanged since it was opened; start again")

    @property
    def location(self) -> Path:
        return self.path.location

    def stamp(self) -> dict[str, Any]:
        return {"stamp": self._stamp} if self._stamp else {"sample": self.sample()}

    def blocks(self) -> Iterator[bytes]:
        """All its bytes, a piece after the other."""
        for begin in range(0, self.size, PIECE):
            yield self._range(self._place(""), begin, min(PIECE, self.size - begin))

    @property
    def _name(self) -> str:
        return f"{self.path.full} {self._stamp} {self.size}"

    def _place(self, what: str) -> str:
        return f"{self.path}: {what}: " if what else f"{self.path}: "

    def _info(self) -> dict[str, Any]:
        fs, path = filesystem(self.path)
        with missing(self.path, SourceError):
            found: dict[str, Any] = attempt(f"{self.path}: asking for it", SourceError, fs.info, path)
        return found

    def _piece(self, number: int) -> bytes:
        begin = number * PIECE
        return self._range(self._place(""), begin, min(PIECE, self.size - begin))

    def _range(self, place: str, offset: int, count: int) -> bytes:
        if not count:
            return b""
        fs, path = filesystem(self.path)

        def whole() -> bytes:
            got: bytes = fs.cat_file(path, start=offset, end=offset + count)
            if len(got) != count:
                raise OSError(f"{len(got)} of {count} bytes came")
            return got

        with missing(self.path, SourceError):
            return attempt(f"{place}reading {count} bytes at {offset}", SourceError, whole)

    def _refuse_whole_files(self, info: dict[str, Any]) -> None:
        """A web server may know no ranges, and send all of a file for each of them."""
        fs, path = filesystem(self.path)
        refusal = SourceError(f"{self.path}: the server sends whole files only, not ranges of them; download it first")
        if info.get("partial") is False:
            raise refusal
        if self.size < PIECE:  # `_range` sees it, and little harm is done
            return
        with missing(self.path, SourceError):
            file = attempt(f"{self.path}: opening", SourceError, fs.open, path, "rb", cache_type="none")
        try:
            with file:
                file.seek(1)
                file.read(1)
        except ValueError:
            raise refusal from None


def _stamp_of(info: dict[str, Any]) -> str:
    """The first word of a store's answer that changes with the file; '' where there is none."""
    found = next((info[name] for name in _STAMPS if info.get(name)), "")
    return found.isoformat() if isinstance(found, datetime) else str(found)
