"""A folder of weights that is looked at and deleted: laid out as a result is, without lock, journal or flush."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.io import system
from weightsmith.io.disk import remove, writing
from weightsmith.io.write.aside import Aside
from weightsmith.io.write.layout import Shard, Stores, plan_shards
from weightsmith.io.write.sink import Sink
from weightsmith.io.write.writer import ShardWriter, lay_out

__all__ = ["ScratchSink"]


class ScratchSink(Sink):
    """Writes safetensors shards into `folder`, in place of what is there.

    The bytes are those of a `FolderSink`, but they may be lost with the machine.

    spare  the folder of an earlier result: it becomes this one, and shards of the same size are written over, which
           spares the system new pages for them
    """

    noted = False

    def __init__(
        self,
        folder: Path,
        *,
        shard_size: int,
        weight_name: str | Stores,
        metadata: Mapping[str, str],
        spare: Path | None = None,
    ) -> None:
        self.folder, self._spare = folder, spare
        self.shards: list[Shard] = []
        self._options = (shard_size, weight_name, metadata)
        self._writer = ShardWriter(folder, ())

    def begin(self, keys: Sequence[Key]) -> None:
        self.shards = plan_shards(keys, *self._options)
        opened: dict[str, int] = {}
        self._writer = ShardWriter(self.folder, self.shards, opened)
        with writing(self.folder):
            remove(self.folder)
            if self._spare is not None and self._spare.is_dir():
                system.call(self._spare.rename, self.folder)
                self._strip()
            system.call(self.folder.mkdir, parents=True, exist_ok=True)
        for shard in self.shards:
            lay_out(self.folder, shard, opened)

    def _strip(self) -> None:
        """Leave nothing but files that a shard fits into."""
        sizes = {self.folder / shard.name: shard.size for shard in self.shards}
        for path in sorted(system.call(list, self.folder.rglob("*")), reverse=True):  # files before their folder
            if path.is_dir() and not path.is_symlink():
                if not system.call(list, path.iterdir()):
                    remove(path)
                continue
            state = path.lstat()
            plain = stat.S_ISREG(state.st_mode) and state.st_nlink == 1
            if not plain or sizes.get(path) != state.st_size:
                remove(path)

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        self._writer.put(name, start, bits)

    def aside(self) -> Aside:
        return Aside(self.folder)

    def close(self) -> None:
        """Let go of the files, which are complete."""
        self._writer.abort()

    def abort(self) -> None:
        self._writer.abort()
