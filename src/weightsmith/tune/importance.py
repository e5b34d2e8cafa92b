"""Which tensors deserve more coefficients, judged by a first tuning with one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightsmith.core.keys import Key
from weightsmith.core.task import blocks
from weightsmith.inputs.opened import Inputs

__all__ = ["chunks_by", "importance"]


def importance(coefficients: Mapping[str, Tensor], inputs: Inputs, keys: Sequence[Key]) -> dict[str, float]:
    """Tensor -> importance in [0, 1]: how much of it is merged, how far it is changed, and how large it is.

    I = mean_k |a_k| * sum_k ||tau_k||_1 / numel and numel, each over its largest, multiplied, and moved to [0, 1].

    coefficients  tensor -> [n] or [n, 1], as learned

    Source: Expert Merging++ (Zhang et al., 2025), arXiv:2509.25712.  A reconstruction: the paper names the three parts
    and that they are normalised over layers, not the formula, and the authors' code takes finished counts.
    """
    if not keys:
        return {}
    moved = {key.name: float(coefficients[key.name].abs().mean()) * _size(inputs, key) for key in keys}
    most = max(moved.values()) or 1.0
    largest = max(key.numel for key in keys) or 1
    found = {key.name: moved[key.name] / most * key.numel / largest for key in keys}
    low, high = min(found.values()), max(found.values())
    return {name: (value - low) / (high - low) if high > low else 1.0 for name, value in found.items()}


def chunks_by(found: Mapping[str, float], most: int, least: float) -> dict[str, int]:
    """Tensor -> number of coefficients: 1 below the importance `least`, else about `most` times the importance."""
    return {name: 1 if value < least else max(1, round(most * value)) for name, value in found.items()}


def _size(inputs: Inputs, key: Key) -> float:
    """sum_k ||tau_k||_1 / numel, read block by block."""
    assert inputs.base is not None
    total = 0.0
    for start, stop in blocks(key, 0, key.rows):
        base = inputs.base.read(key.name, start, stop).float()
        for model in inputs.experts.values():
            total += float((model.read(key.name, start, stop).float() - base).abs().sum(dtype=torch.float64))
    return total / max(key.numel, 1)
