"""A base and three experts with statistics, small enough for every method: what the tests of runs merge."""

from __future__ import annotations

import numpy as np
import torch

from goldens import tiny_llama
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource

__all__ = ["EXPERTS", "small_inputs"]

EXPERTS = ("e0", "e1", "e2")


def small_inputs(source: type[MemorySource] = MemorySource) -> Inputs:
    """The models as `source`, in bfloat16; statistics in float32."""
    base, experts = tiny_llama.make(3, 3)
    stats = {
        "fisher": [_tensors(d, torch.float32) for d in tiny_llama.positive(3, 3)],
        "gram": [_tensors(d, torch.float32) for d in tiny_llama.grams(3, 3)],
    }
    return Inputs(
        source(_tensors(base), "base"),
        {name: source(_tensors(e), name) for name, e in zip(EXPERTS, experts, strict=True)},
        {s: {n: MemorySource(d, s) for n, d in zip(EXPERTS, found, strict=True)} for s, found in stats.items()},
    )


def _tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(a).to(dtype) for name, a in arrays.items()}
