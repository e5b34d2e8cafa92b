"""Shards of an output in a store, put together on this machine and sent when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.io import system
from weightsmith.io.disk import pwrite_all, writing
from weightsmith.io.url import Url
from weightsmith.io.write.layout import Shard
from weightsmith.io.write.sink import Sink
from weightsmith.io.write.store import put
from weightsmith.io.write.writer import ShardWriter, lay_out

__all__ = ["AT_ONCE", "Left", "ShardUploads", "stub"]

AT_ONCE = 3
"""Shards on this machine at once.  A further one waits while one of these is being sent; where none is, the tasks
do not come in the order of the shards (group methods), and waiting could be for ever."""


class ShardUploads(Sink):
    """Puts shards together on this machine and sends each when it is complete.  Picklable: begins anew elsewhere."""

    def __init__(self, out: Url, shards: Sequence[Shard], folder: Path | None = None) -> None:
        self.out, self.shards, self._given = out, {shard.name: shard for shard in shards}, folder
        self._reset()

    def _reset(self) -> None:
        self._guard = threading.Condition()
        self._sending = 0
        self._own: Path | None = None
        self._opened: dict[str, int] = {}
        self._left = Left(self.shards.values())
        self._shard_of = {name: shard for shard in self.shards.values() for name in shard.keys}
        self._writer: ShardWriter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"out": self.out, "shards": self.shards, "_given": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def begin(self, keys: Sequence[Key]) -> None:
        """Laid out already."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        shard = self._shard_of[name]
        with self._guard:
            if self._writer is None:
                self._writer = ShardWriter(self._folder(), tuple(self.shards.values()), self._opened)
            while shard.name not in self._opened and self._sending and len(self._opened) + self._sending >= AT_ONCE:
                self._guard.wait()
            if shard.name not in self._opened:
                lay_out(self._folder(), shard, self._opened)
        self._writer.write(name, start, bits)

    def done(self, task: str, record: Mapping[str, Any]) -> None:
        """Send the shards that are complete now."""
        with self._guard:
            complete = self._left.less(record)
        for shard in complete:
            self.send(shard)

    def send(self, shard: Shard) -> None:
        path = self._folder() / shard.name
        with self._guard:
            if shard.name not in self._opened:  # a shard of nothing but empty tensors
                lay_out(self._folder(), shard, self._opened)
            os.close(self._opened.pop(shard.name))
            self._sending += 1
        try:
            put(self.out / shard.name, path)
            with writing(path):
                system.call(os.truncate, path, len(shard.header))
                system.call(os.truncate, path, shard.size)  # a hole: what lists the folder sees header and size
        finally:
            with self._guard:
                self._sending -= 1
                self._guard.notify_all()

    def abort(self) -> None:
        """Close and remove what is under work here."""
        while self._opened:
            os.close(self._opened.popitem()[1])
        self._writer = None
        if self._own is not None:
            system.call(shutil.rmtree, self._own, ignore_errors=True)
            self._own = None

    def _folder(self) -> Path:
        if self._given is not None:
            return self._given
        if self._own is None:
            with writing(Path(tempfile.gettempdir())):
                self._own = Path(system.call(tempfile.mkdtemp, prefix="weightsmith-out-"))
            weakref.finalize(self, shutil.rmtree, self._own, True)  # a worker that fails is not told to abort
        return self._own


class Left:
    """Which rows of which tensors are still to come, for each shard."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.rows = {shard.name: {key.name: key.rows for key in shard.keys.values()} for shard in shards}
        self._shard_of = {name: shard for shard in shards for name in shard.keys}

    def less(self, record: Mapping[str, Any]) -> list[Shard]:
        """Take off what a record says was written; returns the shards that are complete with it."""
        complete = []
        for name, start, stop, _ in record["parts"]:
            shard = self._shard_of.get(name)
            left = self.rows.get(shard.name) if shard is not None else None
            if shard is None or left is None or name not in left:
                continue
            left[name] -= stop - start
            if left[name] <= 0:
                del left[name]
            if not left:
                del self.rows[shard.name]
                complete.append(shard)
        return complete


def stub(path: Path, shard: Shard) -> None:
    """Header and size of a shard that is up, with a hole for its data: for what describes the folder."""
    with writing(path):
        system.call(path.parent.mkdir, parents=True, exist_ok=True)
        descriptor = system.call(os.open, path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            pwrite_all(descriptor, shard.header, 0)
            system.call(os.ftruncate, descriptor, shard.size)
        finally:
            os.close(descriptor)
