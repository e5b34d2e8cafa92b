"""Whether both programs computed the same, from their output files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.measure import BenchError
from bench.models import read_tensors

__all__ = ["Agreement", "at_the_cut", "check_exact", "compare"]


@dataclass(frozen=True)
class Agreement:
    """How two outputs differ.

    entries   compared entries
    unlike    share of entries that are not equal
    largest   largest |a - b|
    scale     largest |a|
    change    |a - b| over |a - base| (root mean squares): the difference beside what the merge did
    spread    root mean square of b - base over that of a - base
    """

    entries: int
    unlike: float
    largest: float
    scale: float
    change: float
    spread: float


def compare(ours: Path, theirs: Path, base: Path) -> Agreement:
    """Compare two output folders tensor by tensor; both must hold the base's names and shapes."""
    entries, unlike, largest, scale = 0, 0, 0.0, 0.0
    squares = np.zeros(3)
    for (name, a), (their_name, b), (base_name, origin) in zip(
        read_tensors(ours), read_tensors(theirs), read_tensors(base), strict=True
    ):
        if not name == their_name == base_name or not a.shape == b.shape == origin.shape:
            raise BenchError(f"unlike outputs: {name} {a.shape}, {their_name} {b.shape}, {base_name} {origin.shape}")
        entries += a.size
        unlike += int((a != b).sum())
        largest = max(largest, float(np.abs(a - b).max()))
        scale = max(scale, float(np.abs(a).max()))
        squares += [_square(a - b), _square(a - origin), _square(b - origin)]
    apart, ours_moved, theirs_moved = np.sqrt(squares)
    return Agreement(entries, unlike / entries, largest, scale, apart / ours_moved, theirs_moved / ours_moved)


def check_exact(
    ours: Path, theirs: Path, base: Path, experts: Sequence[Path], density: float | None, close: float = 2e-6
) -> tuple[int, int]:
    """Check that two float32 outputs are one function's; returns (entries, entries left to the sort).

    With `density`, entries whose change is exactly as large as the smallest one kept may fall on either side of
    the cut: neither program says which of equals it takes.  All others must agree within `close`, relative to
    the tensor's largest value.
    """
    entries, free = 0, 0
    models = zip(read_tensors(base), *map(read_tensors, experts), strict=True)
    for (name, a), (_, b), ((_, origin), *tensors) in zip(
        read_tensors(ours), read_tensors(theirs), models, strict=True
    ):
        open_ = np.zeros(a.shape, bool)
        if density is not None:
            for _, tensor in tensors:
                open_ |= at_the_cut(tensor - origin, density)
        entries += a.size
        free += int(open_.sum())
        apart = np.where(open_, 0, np.abs(a - b))
        if apart.max() > close * np.abs(a).max():
            place = np.unravel_index(int(apart.argmax()), a.shape)
            raise BenchError(f"{name} at {[int(i) for i in place]}: weightsmith {a[place]!r}, mergekit {b[place]!r}")
    return entries, free


def at_the_cut(delta: np.ndarray, density: float) -> np.ndarray:
    """Where |delta| equals its k-th largest, k = max(1, int(density size)), and not all such entries are kept."""
    size = np.abs(delta)
    kept = max(1, int(density * size.size))
    threshold = np.partition(size.reshape(-1), size.size - kept)[size.size - kept]
    cut = int((size >= threshold).sum()) > kept
    return np.asarray((size == threshold) & cut)


def _square(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))
