"""Weighted sums in one pass over the stored bytes: bf16 or f32 in, float32 arithmetic, either out.

The torch path in `methods/` is the meaning; this gives the same bytes several times faster, without torch
being imported at all.  numba compiles it on first use and keeps the machine code in its cache folder.
Where numba is missing or cannot compile, `available()` is False and the engine takes the torch path.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from weightsmith.method import WeightedSum

__all__ = ["FUSED_DTYPES", "STRIP", "available", "weighted_sum"]

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
        import numba
    except ImportError:
        return None
    name = "weightsmith.ops.kernels"
    try:
        return importlib.import_module(name)
    except RuntimeError:  # numba found no folder that it may write its cache to: compile into a temporary one
        numba.config.CACHE_DIR = str(Path(tempfile.gettempdir()) / f"weightsmith-kernels-{os.getuid()}")
        return importlib.import_module(name)


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
    acc_buffer = np.empty(min(STRIP, out.size), np.float32)
    base_buffer = np.empty(acc_buffer.size if origin is not None else 0, np.float32)
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
