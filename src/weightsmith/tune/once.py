"""A source that is computed once: what has been read lies in files, for those who read it at every step."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from pathlib import Path

import numpy as np

from weightsmith.io import system
from weightsmith.io.read.source import Bits, Source
from weightsmith.io.read.views import View

__all__ = ["Once"]


class Once(View):
    """The same tensors, from a temporary folder that lives as long as this does; memory holds one at a time."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._room = Path(system.call(tempfile.mkdtemp, prefix="weightsmith-once-"))
        weakref.finalize(self, shutil.rmtree, self._room, ignore_errors=True)
        self._lock = threading.Lock()
        self._kept: dict[str, Path] = {}

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        with self._lock:  # two readers of one tensor: the second waits and finds it there
            if key.name not in self._kept:
                path = self._room / f"{len(self._kept)}.npy"
                system.call(np.save, path, self.source.bits(key.name))
                self._kept[key.name] = path
        bits = system.call(np.load, self._kept[key.name], mmap_mode="r")
        return Bits(np.asarray(bits if not key.shape else bits[low : key.rows if high is None else high]), key.dtype)
