"""What a run notes for itself, in a file without a name: it goes with the process, and may fail without harm."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from weightsmith.io import system

__all__ = ["Aside"]


class Aside:
    """Keeps arrays of bytes by key, from several threads, for who can also make them again.

    folder  on whose disk they lie: half of what is free there is left alone; None: in memory

    Where something fails (a full disk, say) nothing is raised: then they are not there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._file = folder, -1
        self._held: dict[Hashable, np.ndarray] = {}
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._end, self._room, self._guard = 0, 0, threading.Lock()

    def put(self, key: Hashable, data: np.ndarray) -> bool:
        """Note an array, uint8; returns whether that was done."""
        if self._folder is None:
            self._held[key] = data
            return True
        with self._guard:
            if not self._end:
                self._open(self._folder)
            start = self._end
            self._end = end = start + data.nbytes
        if end > self._room:
            return False
        with contextlib.suppress(OSError):
            if system.call(os.pwrite, self._file, data.data, start) == data.nbytes:
                self._places[key] = start, data.nbytes
        return key in self._places

    def _open(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            if hasattr(os, "O_TMPFILE"):
                self._file = system.call(os.open, folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
                free = system.call(os.fstatvfs, self._file)
                self._room = free.f_bavail * free.f_frsize // 2

    def get(self, key: Hashable) -> np.ndarray | None:
        """What was noted."""
        start, size = self._places.get(key, (0, 0))
        if not size:
            return self._held.get(key)
        data = np.empty(size, np.uint8)
        with contextlib.suppress(OSError):
            if system.call(os.preadv, self._file, [data.data], start) == size:
                return data
        return None

    def close(self) -> None:
        """Forget all."""
        self._held, self._places, self._room = {}, {}, 0
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
