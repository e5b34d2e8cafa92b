"""Quantised checkpoints: recognised when they are opened; dequantised where there is one rule for it, else refused.

The rule, for 8-bit floating weights W with scales S stored beside them (`N_scale_inv` of DeepSeek and Qwen, one for
each block of 128 x 128; `N_scale` of compressed-tensors and others, one for each row or tensor): the weight is W * S.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Block, Source
from weightsmith.io.read.views import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ScaledSource", "unquantised"]

_LIMIT = 16_000_000  # bytes of a config.json
_FIELDS = ("quantization_config", "compression_config")
_SCALED = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
"""Methods that may store 8-bit floats with scales beside them; what else they store is refused by its names."""
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors, packed integers",
    ".SCB": "bitsandbytes, 8 bits",
    ".absmax": "bitsandbytes, 4 bits",
    "_blocks": "MXFP4",
    ".weight_scale_2": "NVFP4",
}
"""Endings of the names of tensors that only packed weights have."""
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = (
    ".input_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".k_scale",
    ".v_scale",
    ".activation_scale_ub",
)
_WAY_OUT = "merge the models it was quantised from, and quantise the result"


def unquantised(source: Source) -> Source:
    """The source itself, or a view of it that multiplies 8-bit weights by their scales.

    Raises SourceError, one sentence, where weights are packed in a way that has no exact inverse here.
    """
    config = _config(source.origin.folder)
    quantised: dict[str, Any] = next((config[name] for name in _FIELDS if isinstance(config.get(name), dict)), {})
    method = str(quantised.get("quant_method", ""))
    for name in source.keys:
        kind = next((kind for ending, kind in _PACKED.items() if name.endswith(ending)), None)
        if kind == "MXFP4" and f"{name.removesuffix('_blocks')}_scales" not in source.keys:
            continue
        if kind is not None:
            raise SourceError(f"{source}: quantised weights ({kind}: {name}) cannot be merged; {_WAY_OUT}")
    if method and method not in _SCALED:
        raise SourceError(
            f"{source}: config.json says quantization_config.quant_method = {method!r}, which cannot be merged; "
            f"{_WAY_OUT} (if its weights are not quantised after all, remove that entry)"
        )
    pairs = _pairs(source)
    if not pairs:
        return source
    lone = [
        k.name for k in source.keys.values() if DTYPES[k.dtype].itemsize == 1 and k.floating and k.name not in pairs
    ]
    if lone:
        raise SourceError(f"{source}: {lone[0]} is in 8 bits without the scale that the others have")
    return ScaledSource(source, pairs, _blocks(quantised), config)


def _pairs(source: Source) -> dict[str, str]:
    """8-bit weight -> its scales."""
    found = {}
    for key in source.keys.values():
        if key.floating and DTYPES[key.dtype].itemsize == 1:
            scale = next((key.name + ending for ending in _SCALES if key.name + ending in source.keys), None)
            if scale is not None:
                found[key.name] = scale
    return found


def _blocks(quantised: Mapping[str, Any]) -> tuple[int, int]:
    found = quantised.get("weight_block_size")
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    return 128, 128


def _config(folder: Path | None) -> dict[str, Any]:
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return {}
    try:
        found = read_json(path, _LIMIT)
    except SourceError:
        return {}  # whoever needs it will say what is wrong with it
    return found if isinstance(found, dict) else {}


class ScaledSource(View):
    """A checkpoint of 8-bit weights with scales, as the weights that they stand for.

    Its dtype is what config.json says the model is to be run in (bfloat16 if it does not); values are read in float32.
    Scales, and those of activations, are not there.
    """

    shows = "weights times scales"

    def __init__(
        self, source: Source, pairs: Mapping[str, str], blocks: tuple[int, int], config: Mapping[str, Any]
    ) -> None:
        kept = {name: value for name, value in config.items() if name not in _FIELDS}
        text = json.dumps(kept, indent=2) + "\n" if config else None
        super().__init__(source, origin=replace(source.origin, config=text))
        self.pairs, self.blocks = dict(pairs), blocks
        hidden = set(pairs.values())
        hidden |= {name for name in source.keys if name.endswith(_OF_ACTIVATIONS)}
        dtype = _run_dtype(config)
        self.keys = {
            name: Key(name, key.shape, dtype) if name in pairs else key
            for name, key in source.keys.items()
            if name not in hidden
        }
        for name, scale in pairs.items():
            self._steps(source.key(name).shape, source.key(scale))

    def computes(self, name: str) -> bool:
        return self.key(name).name in self.pairs or super().computes(name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        return self._scaled(key, low, high) if key.name in self.pairs else super().block(name, low, high, into)

    def read_cost(self, name: str) -> float:
        return super().read_cost(name) + (2.0 if self.computes(name) else 0.0)

    def _scaled(self, key: Key, start: int, stop: int | None) -> Tensor:
        value = self.source.read(key.name, start, stop).float()
        scale = self.source.key(self.pairs[key.name])
        first, last, _ = slice(start, stop).indices(key.rows)
        steps = self._steps(key.shape, scale)
        if not steps:
            return value * self.source.read(scale.name).float().reshape(())
        low, high = first // steps[0], -(-last // steps[0])
        found = self.source.read(scale.name, low, high).float().reshape(high - low, *self._spread(key, scale)[1:])
        rows = torch.arange(first, last) // steps[0] - low
        found = found.index_select(0, rows)
        for axis, step in enumerate(steps[1:], 1):
            found = found.index_select(axis, torch.arange(key.shape[axis]) // step)
        return value * found

    def _spread(self, key: Key, scale: Key) -> tuple[int, ...]:
        """The scales' shape with as many axes as the weight's: [out] is [out, 1]."""
        return (*scale.shape, *(1,) * (len(key.shape) - len(scale.shape)))

    def _steps(self, shape: tuple[int, ...], scale: Key) -> tuple[int, ...]:
        """How many entries of each axis share a scale; () where the whole tensor has one."""
        if scale.numel == 1:
            return ()
        given = self._spread(Key("", shape, scale.dtype), scale)
        sizes = (*(1,) * (len(shape) - 2), *self.blocks)[-len(shape) :]
        steps = []
        for length, count, size in zip(shape, given, sizes, strict=False):
            step = length if count == 1 else 1 if count == length else size
            if -(-length // max(step, 1)) != count:
                break
            steps.append(step)
        if len(steps) != len(shape) or len(given) != len(shape):
            raise SourceError(f"{self}: {scale.name} of shape {list(scale.shape)} does not fit weights of shape "
                              f"{list(shape)} in blocks of {self.blocks[0]} x {self.blocks[1]}")  # fmt: skip
        return tuple(steps)


def _run_dtype(config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for name in ("dtype", "torch_dtype"):
            found = str(place.get(name, "")).removeprefix("torch.")
            if found in DTYPES and DTYPES[found].floating and DTYPES[found].itemsize > 1:
                return found
    return "bfloat16"
