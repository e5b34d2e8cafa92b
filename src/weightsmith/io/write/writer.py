"""Writing rows to their places in the shards of an output folder: in this process, or in others that see its disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.keys import DTYPES, Key
from weightsmith.io import system
from weightsmith.io.disk import allocate, pwrite_all, writing
from weightsmith.io.write.layout import Shard
from weightsmith.io.write.sink import Sink

__all__ = ["ShardWriter", "lay_out"]


def lay_out(folder: Path, shard: Shard, opened: dict[str, int]) -> None:
    """Make a shard's file with its header and room for its data; `opened` has its descriptor, also if that fails."""
    path = folder / shard.name
    with writing(path):
        if "/" in shard.name:
            system.call(path.parent.mkdir, parents=True, exist_ok=True)
        opened[shard.name] = system.call(os.open, path, os.O_RDWR | os.O_CREAT, 0o666)
        allocate(opened[shard.name], shard.size)
        pwrite_all(opened[shard.name], shard.header, 0)


class ShardWriter(Sink):
    """Writes into shards that are laid out already.  Picklable: another process opens the files for itself.

    What is laid out, journalled and published is the business of the `FolderSink` that it was made from.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], opened: dict[str, int] | None = None) -> None:
        self.folder = folder
        self._places = {name: (shard, key) for shard in shards for name, key in shard.keys.items()}
        self._descriptors = {} if opened is None else opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def begin(self, keys: Sequence[Key]) -> None:
        """Laid out already."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Store rows `start`, `start + 1`, ... of a tensor: bits [rows, *rest], or [] for a 0-dim tensor."""
        self.put(name, start, bits)

    def put(self, name: str, start: int, bits: np.ndarray) -> tuple[int, int]:
        """`write`, and into which descriptor how many bytes."""
        shard, key = self._places[name]
        width = DTYPES[key.dtype].itemsize
        rows = bits.shape[0] if bits.ndim else 1
        if bits.itemsize != width or bits.shape[1:] != key.shape[1:] or not 0 <= start <= start + rows <= key.rows:
            raise ValueError(f"{name}: rows {start}.. of {bits.dtype} {bits.shape} are no part of {key}")
        with writing(self.folder / shard.name):
            descriptor = self._descriptor(shard.name)
            if bits.size:
                data = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data
                pwrite_all(descriptor, data, shard.offsets[name] + start * key.row_numel * width)
        return descriptor, bits.nbytes

    def done(self, task: str, record: Mapping[str, Any]) -> None:
        """Flush: once a task is reported as done, its bytes must outlive this process and this machine."""
        for name, descriptor in self._descriptors.items():
            with writing(self.folder / name):
                system.call(os.fdatasync, descriptor)
        self.abort()

    def abort(self) -> None:
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            with contextlib.suppress(OSError):  # it was flushed before, or is not wanted any more
                os.close(descriptor)

    def _descriptor(self, shard: str) -> int:
        if shard not in self._descriptors:
            self._descriptors[shard] = system.call(os.open, self.folder / shard, os.O_WRONLY | os.O_CLOEXEC)
        return self._descriptors[shard]
