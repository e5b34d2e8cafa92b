"""Made-up models for the same-bytes cases: tiny, awkward, and the same on every machine.

Only NumPy's raw uniform numbers and exactly rounded arithmetic are used: no torch generator, no transcendental
functions, whose last bits belong to a library.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Model = dict[str, Tensor]

FLOAT32 = (torch.float32,)
BFLOAT16 = (torch.bfloat16,)
MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
"""Stored dtypes, one tensor after the other."""


def uniform(shape: tuple[int, ...], *seed: int | str) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed alone."""
    words = [zlib.crc32(s.encode()) if isinstance(s, str) else s for s in seed]
    return np.random.Generator(np.random.PCG64(words)).random(shape)


def bell(shape: tuple[int, ...], *seed: int | str) -> np.ndarray:
    """Nearly normal numbers: sums of four uniform ones, of variance 1."""
    parts = uniform((4, *shape), *seed)
    return (parts[0] + parts[1] + parts[2] + parts[3] - 2.0) * 3.0**0.5


def change(shape: tuple[int, ...], *seed: int | str) -> np.ndarray:
    """A task vector: small numbers, a fifth of them zero, a fifth on a coarse grid (ties), and outliers."""
    values = 0.05 * bell(shape, *seed, "size")
    kind = uniform(shape, *seed, "kind")
    values = np.where(kind < 0.2, 0.0, values)
    values = np.where((kind >= 0.2) & (kind < 0.4), np.round(values * 32) / 32, values)
    return np.where(kind > 0.97, 8 * values, values)


LLAMA: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.1.self_attn.o_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.layers.2.mlp.down_proj.weight": (8, 12),
    "model.layers.2.input_layernorm.weight": (8,),
    "lm_head.weight": (13, 8),
}
"""A few tensors of each role, in three blocks."""

AWKWARD: Mapping[str, tuple[int, ...]] = {
    "one_row.weight": (1, 9),
    "one_column.weight": (9, 1),
    "single.weight": (1,),
    "scalar": (),
    "empty.weight": (0, 4),
    "narrow.weight": (7, 67),
    "tall.weight": (40, 3),
    "three.weight": (3, 4, 5),
    "conv.weight": (4, 3, 2, 2),
}

VARIED: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.layers.2.mlp.down_proj.weight": (8, 12),
    "model.layers.2.input_layernorm.weight": (8,),
    "narrow.weight": (7, 67),
    "three.weight": (3, 4, 5),
    "scalar": (),
}
"""Fewer of them."""

SPECIAL = ("same", "zero", "cancel", "one_is_the_base", "low_rank", "huge", "tiny", "negative_zero")
"""(6, 6) tensors that break careless arithmetic, see `_special`."""


def _special(kind: str, model: int) -> np.ndarray:
    """Values of model 0 (the base) or of an expert."""
    shape, square = (6, 6), bell((6, 6), kind)
    own = 0.1 * bell(shape, kind, model) if model else np.zeros(shape)
    if kind == "same":
        return square
    if kind == "zero":
        return np.zeros(shape)
    if kind == "cancel":
        return square * (0 if model == 0 else 0.25 if model % 2 else -0.25)
    if kind == "one_is_the_base":
        return square + (0 if model == 1 else own)
    if kind == "low_rank":
        return np.outer(own[0], own[1])
    if kind == "huge":
        return 1e30 * (square + own)
    if kind == "tiny":
        return 1e-30 * (square + own)
    return np.where(uniform(shape, kind, model) < 0.5, -0.0, 0.25 * model)


def family(
    count: int,
    shape_of: Mapping[str, tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...] = FLOAT32,
    *,
    special: tuple[str, ...] = (),
    wider: bool = False,
) -> tuple[Model, dict[str, Model]]:
    """A base and experts e0, e1, ...

    dtypes: of the tensors, taken in turn; wider: expert 1 stores everything in float32.
    """
    made: list[Model] = [{} for _ in range(count + 1)]
    for at, (name, shape) in enumerate(shape_of.items()):
        start = bell(shape, name) + (1.0 if "norm" in name else 0.0)
        for index, model in enumerate(made):
            values = start + (change(shape, name, index) if index else 0.0)
            dtype = torch.float32 if wider and index == 2 else dtypes[at % len(dtypes)]
            model[name] = tensor(values).to(dtype)
    for index, model in enumerate(made if special else []):
        model |= {f"{kind}.weight": tensor(_special(kind, index)) for kind in special}
        model["position_ids"] = torch.arange(7)
        model["mask"] = torch.arange(6).reshape(2, 3) % 2 == 0
    return made[0], {f"e{i}": model for i, model in enumerate(made[1:])}


def tensor(values: np.ndarray | float) -> Tensor:
    """float32, rounded once by NumPy."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())


def fisher(experts: Mapping[str, Model], *, called: str = "fisher") -> dict[str, dict[str, Model]]:
    """Positive, heavy-tailed importances of every floating tensor."""
    return {
        name: {
            called: {
                key: tensor(1e-3 * uniform(tuple(value.shape), key, index, "fisher") ** 4 + 1e-8)
                for key, value in state.items()
                if value.dtype.is_floating_point
            }
        }
        for index, (name, state) in enumerate(experts.items())
    }


def gram(experts: Mapping[str, Model], *, rows: bool = False) -> dict[str, dict[str, Model]]:
    """X^T X of 20 inputs for every matrix but the embedding; rows: inputs as many as rows (Conv1D)."""
    found: dict[str, dict[str, Model]] = {}
    for index, (name, state) in enumerate(experts.items()):
        found[name] = {"gram": {}}
        for key, value in state.items():
            if value.dim() == 2 and value.dtype.is_floating_point and "embed" not in key:
                size = value.shape[0 if rows else 1]
                inputs = np.round(bell((20, size), key, index, "gram") * 64) / 64
                outer = inputs[:, :, None] * inputs[:, None, :]  # exact: few bits, so that any order of sums agrees
                found[name]["gram"][key] = tensor(outer.sum(0) / 16)
    return found
