"""Checksums of what a task writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from weightsmith.core.task import Task, parts

__all__ = ["Hashes"]


class Hashes:
    """xxh3-128 of every part of a task's tensors, fed in row order."""

    def __init__(self, task: Task) -> None:
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        whole = task.group or (task.start, task.stop) == (0, task.key.rows)
        width = task.key.row_numel
        cut = {part.key.name: part.rows(task.start * width, task.stop * width) for part in task.encoded}
        for key in task.keys:
            ranges = parts(key) if whole else [cut.get(key.name, (task.start, task.stop))]
            self._parts[key.name] = [(low, high, xxhash.xxh3_128()) for low, high in ranges]

    def add(self, name: str, start: int, bits: np.ndarray) -> None:
        rows = bits.shape[0] if bits.ndim else 1
        for low, high, digest in self._parts[name]:
            first, last = max(low, start), min(high, start + rows)
            if first < last:
                piece = bits[first - start : last - start] if bits.ndim else bits
                digest.update(np.ascontiguousarray(piece).view(np.uint8).data if piece.ndim else piece.tobytes())

    def records(self) -> list[list[Any]]:
        return [[n, low, high, d.hexdigest()] for n, found in self._parts.items() for low, high, d in found]
