"""Weighted sums and trimmed votes straight over the stored bytes: bf16 or f32 in, float32 arithmetic, either out.

The torch path in `methods/` is the meaning; this gives the same bytes several times faster, without torch
being imported at all.  numba compiles it on first use and keeps the machine code in its cache folder.
Where numba is missing or cannot compile, `available()` is False and the engine takes the torch path.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from weightsmith.kernel import TrimmedVote, WeightedSum
from weightsmith.method import Rows
from weightsmith.ops.select import HIGH, LOW

__all__ = ["FUSED_DTYPES", "STRIP", "Counts", "available", "lean", "merge", "trimmed_vote", "weighted_sum"]

FUSED_DTYPES = ("bfloat16", "float32")
"""Dtypes whose bits the kernels read and write themselves; anything else takes the torch path."""

STRIP = 1 << 16
"""Elements worked on at once: the float32 accumulator and the decoded base stay in a core's L2 cache."""


@functools.cache
def _kernels() -> ModuleType | None:
    """Compile the kernels, or load them from numba's cache; None where that is impossible."""
    if os.environ.get("WEIGHTSMITH_KERNELS", "1") == "0":
        return None
    try:
        with _without_scipy():
            import numba
    except ImportError:
        return None
    name = "weightsmith.ops.kernels"
    try:
        return importlib.import_module(name)
    except RuntimeError:  # numba found no folder that it may write its cache to: compile into a temporary one
        numba.config.CACHE_DIR = str(_own_folder(Path(tempfile.gettempdir()) / f"weightsmith-kernels-{os.getuid()}"))
        return importlib.import_module(name)


def _own_folder(path: Path) -> Path:
    """This folder if nobody else can have put anything there, else a fresh one: numba unpickles what it finds."""
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return path
    return Path(tempfile.mkdtemp(prefix="weightsmith-kernels-"))


_lean = False


def lean() -> None:
    """For a process of our own (the command line): load numba without SciPy, which it takes for its own dot products.

    Saves a third of its start.  SciPy itself can still be imported afterwards.
    """
    global _lean  # noqa: PLW0603  (a choice for the whole process)
    _lean = True


@contextlib.contextmanager
def _without_scipy() -> Iterator[None]:
    if not _lean or "scipy" in sys.modules or "numba" in sys.modules:
        yield
        return
    sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["scipy"]


def available() -> bool:
    """Whether fused kernels can be used in this process."""
    return _kernels() is not None


def weighted_sum(
    spec: WeightedSum, inputs: Sequence[np.ndarray], base: np.ndarray | None, out_dtype: str
) -> tuple[np.ndarray, int]:
    """Combine equally shaped arrays of stored bits (uint16: bfloat16, uint32: float32).

    `base` is needed where `spec.deltas`.  Returns (bits of the result in `out_dtype`, how many are NaN or Inf).
    """
    kernels = _kernels()
    assert kernels is not None
    flat = [a.reshape(-1) for a in inputs]
    origin = base.reshape(-1) if base is not None and spec.deltas else None
    out = np.empty(flat[0].size, "u2" if out_dtype == "bfloat16" else "u4")
    acc_buffer, base_buffer = _scratch("acc", STRIP), _scratch("base", STRIP)
    divisor, scale = np.float32(spec.divisor), np.float32(spec.scale)
    bad = 0
    for low in range(0, out.size, STRIP):
        high = min(low + STRIP, out.size)
        acc, plain = acc_buffer[: high - low], base_buffer[: high - low]
        if origin is not None:
            kernels.decode(origin[low:high], plain)
        for i, bits in enumerate(flat):
            kernels.accumulate(acc, bits[low:high], plain, np.float32(spec.weights[i]), i == 0, spec.deltas)
        bad += kernels.finish(acc, plain, divisor, scale, spec.deltas, out[low:high])
    return out.reshape(inputs[0].shape), int(bad)


def merge(
    spec: WeightedSum | TrimmedVote,
    inputs: Sequence[np.ndarray],
    base: np.ndarray | None,
    out_dtype: str,
    summary: Mapping[str, Any],
    start: int,
) -> tuple[np.ndarray, int]:
    """Carry out either kind on a block that begins at row `start`: (bits of the result, how much is NaN or Inf)."""
    if isinstance(spec, WeightedSum):
        return weighted_sum(spec, inputs, base, out_dtype)
    assert base is not None
    return trimmed_vote(spec, inputs, base, out_dtype, summary, start)


class Counts:
    """One measuring pass of a trimmed vote over a tensor: what `Ties.measure` finds, without torch.

    spec    the vote
    step    'high', 'low', 'ties' or 'signs'
    rows    of the tensor, or of the part of it that is measured
    """

    def __init__(self, spec: TrimmedVote, step: str, rows: int) -> None:
        count = len(spec.weights)
        shapes = {"high": (count, HIGH), "low": (count, 1, LOW), "ties": (count, 1, rows), "signs": ()}
        self._spec, self._step = spec, step
        self._counts = np.zeros(shapes[step], np.int64)

    def add(
        self, inputs: Sequence[np.ndarray], base: np.ndarray, summary: Mapping[str, Any], start: int, place: int
    ) -> None:
        """Count one block, which begins at row `start` of the tensor and at row `place` of what is measured."""
        kernels = _kernels()
        assert kernels is not None
        deltas, _ = _deltas(kernels, inputs, base)
        rows = base.shape[0] if base.ndim else 1
        for i, delta in enumerate(deltas):
            if self._step == "high":
                kernels.count_high(delta, self._counts[i])
            elif self._step == "low":
                kernels.count_low(delta, int(summary["select.bucket"][i, 0]), self._counts[i, 0])
            elif self._step == "ties":
                found = self._counts[i, 0, place : place + rows]
                kernels.count_equal(delta, int(summary["select.threshold"][i, 0]), delta.size // rows, found)
        if self._step == "signs":
            _trim(kernels, self._spec, deltas, summary, start, rows)
            signs = _scratch("signs", deltas.shape[1])
            self._counts += kernels.elect(deltas, np.array(self._spec.weights, np.float32), signs)

    def result(self) -> dict[str, Any]:
        """The totals, as `select.digest` and `Ties.digest` take them."""
        if self._step == "ties":
            return {"select.equal": Rows(self._counts)}  # type: ignore[arg-type]
        return {"ties.signs" if self._step == "signs" else f"select.{self._step}": self._counts}


def trimmed_vote(
    spec: TrimmedVote,
    inputs: Sequence[np.ndarray],
    base: np.ndarray,
    out_dtype: str,
    summary: Mapping[str, Any],
    start: int,
) -> tuple[np.ndarray, int]:
    """`Ties.merge` on a block that begins at row `start`; the second value counts bad inputs as well."""
    kernels = _kernels()
    assert kernels is not None
    deltas, plain = _deltas(kernels, inputs, base)
    bad = sum(kernels.count_bad(delta) for delta in deltas)  # a vote would hide them
    _trim(kernels, spec, deltas, summary, start, base.shape[0] if base.ndim else 1)
    weights = np.array(spec.weights, np.float32)
    signs, divisor, total = (_scratch(name, plain.size) for name in ("signs", "divisor", "total"))
    kernels.elect(deltas, weights, signs)
    kernels.combine(deltas, weights, signs, np.float32(_zero_sign(spec, summary)), spec.mean, divisor, total)
    out = np.empty(plain.size, "u2" if out_dtype == "bfloat16" else "u4")
    bad += kernels.finish(total, plain, np.float32(1), np.float32(spec.scale), True, out)
    return out.reshape(base.shape), int(bad)


def _deltas(kernels: ModuleType, inputs: Sequence[np.ndarray], base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Task vectors [n, entries] and the base [entries], float32."""
    plain = _scratch("base", base.size)
    kernels.decode(base.reshape(-1), plain)
    deltas = _scratch("deltas", len(inputs) * base.size).reshape(len(inputs), base.size)
    for bits, delta in zip(inputs, deltas, strict=True):
        kernels.accumulate(delta, bits.reshape(-1), plain, np.float32(1), True, True)
    return deltas, plain


_local = threading.local()


def _scratch(name: str, size: int) -> np.ndarray:
    """A float32 buffer of this thread, kept for the next block: fresh ones cost more in page faults than the sums."""
    kept: dict[str, np.ndarray] = _local.__dict__
    if name not in kept or kept[name].size < size:
        kept[name] = np.empty(size, np.float32)
    return kept[name][:size]


def _trim(
    kernels: ModuleType, spec: TrimmedVote, deltas: np.ndarray, summary: Mapping[str, Any], start: int, rows: int
) -> None:
    """Zero what the cuts of `ops.select` leave out, as `select.before` does, in rows start .. start + rows."""
    if not spec.trim:
        return
    for i, delta in enumerate(deltas):
        threshold, quota, ties = (int(np.asarray(summary[f"select.{k}"])[i, 0]) for k in ("threshold", "quota", "ties"))
        if quota == ties:
            kernels.trim(delta, threshold if quota else threshold + 1)
            continue
        earlier = summary["select.earlier"][i, 0]
        seen, after = int(earlier[start]), int(earlier[start + rows]) if start + rows < len(earlier) else ties
        if seen >= quota or after <= quota:  # all equals in this block go, or all stay
            kernels.trim(delta, threshold if after <= quota else threshold + 1)
        else:
            kernels.trim_equals(delta, threshold, seen, quota)


def _zero_sign(spec: TrimmedVote, summary: Mapping[str, Any]) -> float:
    if spec.zero == "plus" or int(summary["ties.signs"]) == 0:
        return 1.0
    majority = 1.0 if int(summary["ties.signs"]) > 0 else -1.0
    return majority if spec.zero == "majority" else -majority
