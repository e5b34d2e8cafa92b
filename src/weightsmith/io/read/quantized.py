"""Quantised checkpoints: recognised when they are opened; dequantised where there is one rule for it, else refused.

The rule, for 8-bit floating weights W with scales S stored beside them: the weight is W * S.  S has one value for each
block (of 128 x 128, or as config.json says), row or tensor; stored as unsigned bytes it holds exponents, 2^(S - 127),
one for each 32 entries of a row (MXFP8).  What S is called, for a weight N.weight:

    N.weight_scale_inv   DeepSeek, Qwen          N.scale, N.qscale_weight   as transformers reads them too
    N.weight_scale       compressed-tensors      N.scale_weight             ComfyUI, beside a marker `scaled_fp8`

What is quantised is told by the tensors, whatever config.json says: integers that a scale belongs to are refused, and
so are scales that are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    "_weight_qdata": "torchao",
}
"""Endings of the names of tensors that only packed weights have."""
_OF_WEIGHT = ("_scale_inv", "_scale")
_OF_MODULE = (".scale", ".qscale_weight", ".scale_weight")
"""What a scale's name has more than its weight's, or than its module's."""
_OF_ACTIVATIONS = (
    *(".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale", ".activation_scale_ub"),
    *(".scale_input", ".qscale_act"),
)
_MARKERS = ("scaled_fp8", "comfy_quant")
"""Tensors that hold no weights: ComfyUI's notes of how a file, or a layer of it, is stored."""
_EXPONENTS, _BLOCK = "uint8", (1, 32)
"""How MXFP8 stores scales, and how many entries of each axis share one."""
_WAY_OUT = "merge the models it was quantised from, and quantise the result"


def unquantised(source: Source) -> Source:
    """The source itself, or a view of it that multiplies 8-bit weights by their scales.

    Raises SourceError, one sentence, where weights are packed in a way that has no exact inverse here.
    """
    config = _config(source.origin.folder)
    quantised: dict[str, Any] = next((config[name] for name in _FIELDS if isinstance(config.get(name), dict)), {})
    method = str(quantised.get("quant_method", ""))
    companions = _companions(source)
    if (packed := _packed(source, companions)) is not None:
        raise SourceError(f"{source}: quantised weights ({packed}) cannot be merged; {_WAY_OUT}")
    if method and method not in _SCALED:
        raise SourceError(
            f"{source}: config.json says quantization_config.quant_method = {method!r}, which cannot be merged; "
            f"{_WAY_OUT} (if its weights are not quantised after all, remove that entry)"
        )
    pairs = {name: scale for name in companions if (scale := _scale(source, name)) is not None}
    markers = {name for name in source.keys if name.rpartition(".")[2] in _MARKERS}
    if not pairs and not markers:
        _refuse_unknown(source, companions, {})
        return source
    if pairs and (lone := [key.name for key in source.keys.values() if _is_coded(key) and key.floating
                           and key.name not in pairs and key.name not in (markers | set(pairs.values()))]):  # fmt: skip
        raise SourceError(f"{source}: {lone[0]} is in 8 bits without the scale that the others have")
    _refuse_unknown(source, companions, pairs)
    return ScaledSource(source, pairs, markers, _blocks(quantised), config)


def _companions(source: Source) -> dict[str, list[str]]:
    """Weight of 8-bit floats or integers -> the smaller tensors that may be scales of it, by their names."""
    coded = {key.name: key for key in source.keys.values() if _is_coded(key) and not _like_a_scale(key.name)}
    floats = {name for name, key in coded.items() if key.floating}
    # Beside 8-bit floats whatever has the weight's name and more (`weight_s`) is taken for one, too.
    scales = [
        name
        for name in source.keys
        if _like_a_scale(name) or (name not in coded and any(start in floats for start in _starts(name)))
    ]
    found: dict[str, list[str]] = {name: [] for name in coded}
    modules = {name.removesuffix(".weight"): name for name in coded if name.endswith(".weight")}
    for scale in scales:
        owner = next((n for start in _starts(scale) if (n := start if start in coded else modules.get(start))), None)
        if owner is not None and source.keys[scale].numel < max(coded[owner].numel, 2):
            found[owner].append(scale)
    return found


def _like_a_scale(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "scale" in last or "scl" in last


def _starts(name: str) -> Iterator[str]:
    """Beginnings of a scale's name that may be its weight's, or its module's, the longest first."""
    last = name.rpartition(".")[0].rpartition(".")[0]
    for i in range(len(name) - 1, len(last), -1):
        if name[i] in "._":
            yield name[:i]


def _is_coded(key: Key) -> bool:
    """Whether a tensor may hold codes: 8-bit floats, or a matrix of integers."""
    return DTYPES[key.dtype].itemsize == 1 if key.floating else len(key.shape) > 1 and key.dtype != "bool"


def _packed(source: Source, companions: Mapping[str, list[str]]) -> str | None:
    """What kind of packed weights there are, with the name of one; None if there are none."""
    for name in source.keys:
        kind = next((kind for ending, kind in _PACKED.items() if name.endswith(ending)), None)
        if kind is not None and (kind != "MXFP4" or f"{name.removesuffix('_blocks')}_scales" in source.keys):
            return f"{kind}: {name}"
    for name, scales in companions.items():
        if scales and not source.keys[name].floating:
            kind = "MLX" if scales[0].endswith(".scales") else f"{source.keys[name].dtype} with scales"
            return f"{kind}: {name}, {scales[0]}"
        module = name.removesuffix(".weight")
        if f"{module}.comfy_quant" in source.keys and scales and source.keys[scales[0]].numel > 1:
            return f"ComfyUI, scales of blocks: {scales[0]}"
    return None


def _scale(source: Source, name: str) -> str | None:
    """The scales of an 8-bit floating weight."""
    if not source.keys[name].floating:
        return None
    return next((scale for scale in _known_scales(name) if scale in source.keys), None)


def _known_scales(name: str) -> Iterator[str]:
    yield from (name + ending for ending in _OF_WEIGHT)
    if name.endswith(".weight"):
        yield from (name.removesuffix(".weight") + ending for ending in _OF_MODULE)


def _refuse_unknown(source: Source, companions: Mapping[str, list[str]], pairs: Mapping[str, str]) -> None:
    for name, scales in companions.items():
        unknown = [scale for scale in scales if scale != pairs.get(name) and not scale.endswith(_OF_ACTIVATIONS)]
        if unknown:
            raise SourceError(
                f"{source}: quantised weights (8-bit floats: {name}) with a scale that is not known here, "
                f"{unknown[0]}, cannot be merged; {_WAY_OUT}"
            )


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

    Its dtype is what config.json says the model is to be run in, else that of its other tensors of 16 bits, else
    bfloat16; values are read in float32.  Scales, those of activations, and markers are not there.
    """

    shows = "weights times scales"

    def __init__(
        self,
        source: Source,
        pairs: Mapping[str, str],
        markers: set[str],
        blocks: tuple[int, int],
        config: Mapping[str, Any],
    ) -> None:
        kept = {name: value for name, value in config.items() if name not in _FIELDS}
        text = json.dumps(kept, indent=2) + "\n" if config else None
        super().__init__(source, origin=replace(source.origin, config=text))
        self.pairs, self.blocks = dict(pairs), blocks
        hidden = markers | set(pairs.values())
        hidden |= {name for name in source.keys if name.endswith(_OF_ACTIVATIONS)}
        dtype = _run_dtype(config) or _neighbours(source)
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
            return value * self._factors(scale).reshape(())
        low, high = first // steps[0], -(-last // steps[0])
        found = self._factors(scale, low, high).reshape(high - low, *self._spread(key, scale)[1:])
        rows = torch.arange(first, last) // steps[0] - low
        found = found.index_select(0, rows)
        for axis, step in enumerate(steps[1:], 1):
            found = found.index_select(axis, torch.arange(key.shape[axis]) // step)
        return value * found

    def _factors(self, scale: Key, low: int = 0, high: int | None = None) -> Tensor:
        """Rows of scales, as float32."""
        if scale.dtype != _EXPONENTS:
            return self.source.read(scale.name, low, high).float()
        exponents = self.source.bits(scale.name, low, high).astype(np.int32) - 127
        factors = np.ldexp(np.float32(1), exponents)
        return torch.from_numpy(np.where(exponents == 128, np.float32("nan"), factors))

    def _spread(self, key: Key, scale: Key) -> tuple[int, ...]:
        """The scales' shape with as many axes as the weight's: [out] is [out, 1]."""
        return (*scale.shape, *(1,) * (len(key.shape) - len(scale.shape)))

    def _steps(self, shape: tuple[int, ...], scale: Key) -> tuple[int, ...]:
        """How many entries of each axis share a scale; () where the whole tensor has one."""
        if scale.numel == 1 and scale.dtype != _EXPONENTS:
            return ()
        given = self._spread(Key("", shape, scale.dtype), scale)
        blocks = _BLOCK if scale.dtype == _EXPONENTS else self.blocks
        sizes = (*(1,) * (len(shape) - 2), *blocks)[-len(shape) :]
        steps = []
        for length, count, size in zip(shape, given, sizes, strict=False):
            step = size if blocks == _BLOCK else length if count == 1 else 1 if count == length else size
            if -(-length // max(step, 1)) != count:
                break
            steps.append(step)
        if len(steps) != len(shape) or len(given) != len(shape):
            raise SourceError(f"{self}: {scale.name} of shape {list(scale.shape)} does not fit weights of shape "
                              f"{list(shape)} in blocks of {blocks[0]} x {blocks[1]}")  # fmt: skip
        return tuple(steps)


def _run_dtype(config: Mapping[str, Any]) -> str | None:
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for name in ("dtype", "torch_dtype"):
            found = str(place.get(name, "")).removeprefix("torch.")
            if found in DTYPES and DTYPES[found].floating and DTYPES[found].itemsize > 1:
                return found
    return None


def _neighbours(source: Source) -> str:
    """The dtype of the tensors that are not quantised."""
    found = (key.dtype for key in source.keys.values() if key.floating and DTYPES[key.dtype].itemsize == 2)
    return next(found, "bfloat16")
