"""Checkpoints to merge: a made-up base and experts in Qwen2's layout, written once and kept.

The values are noise (base 0.02 N(0, 1), experts base + 0.001 N(0, 1), so that a change is 5% of the base's
norm); no merge is quicker or slower for it.  The layout is real: tied embeddings, biases on q, k and v.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SHAPES", "Shape", "decode", "encode", "make_models", "read_tensors", "write_model"]

BASE, CHANGE = 0.02, 0.001
"""Standard deviations of the base's weights and of an expert's change."""

_CODES = {"bfloat16": "BF16", "float32": "F32"}
_UNSIGNED = {"BF16": np.uint16, "F32": np.uint32}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model."""

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int

    def config(self, dtype: str) -> dict[str, object]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            found |= {
                f"{layer}.input_layernorm.weight": (self.hidden,),
                f"{layer}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{layer}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{layer}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{layer}.post_attention_layernorm.weight": (self.hidden,),
                f"{layer}.self_attn.k_proj.bias": (kv,),
                f"{layer}.self_attn.k_proj.weight": (kv, self.hidden),
                f"{layer}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{layer}.self_attn.q_proj.bias": (self.hidden,),
                f"{layer}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{layer}.self_attn.v_proj.bias": (kv,),
                f"{layer}.self_attn.v_proj.weight": (kv, self.hidden),
            }
        return {**found, "model.norm.weight": (self.hidden,)}


SHAPES: Mapping[str, Shape] = {
    # Qwen2-0.5B: 494 M parameters, 0.99 GB in bfloat16
    "full": Shape(vocab=151936, hidden=896, layers=24, intermediate=4864, heads=14, kv_heads=2),
    # the same tensors, two layers: 166 M parameters, 0.33 GB; for twelve experts
    "flat": Shape(vocab=151936, hidden=896, layers=2, intermediate=4864, heads=14, kv_heads=2),
    "small": Shape(vocab=32000, hidden=512, layers=4, intermediate=1408, heads=8, kv_heads=2),
    "tiny": Shape(vocab=1000, hidden=64, layers=2, intermediate=128, heads=4, kv_heads=2),
}


def make_models(root: Path, size: str, experts: int, dtype: str = "bfloat16") -> list[Path]:
    """The folders of a base and `experts` experts, in this order; those that exist already are not made again."""
    folders = [root / f"{size}-{dtype}" / name for name in ("base", *(f"expert{i:02d}" for i in range(experts)))]
    for number, folder in enumerate(folders):
        if not folder.exists():
            write_model(folder, SHAPES[size], dtype, number)
    return folders


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a folder as float32, by rising name, one in memory at a time."""
    files = sorted(folder.glob("*.safetensors"))
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        places |= {name: (path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    for name in sorted(places):
        path, start, entry = places[name]
        first, last = entry["data_offsets"]
        kind = np.dtype(_UNSIGNED[entry["dtype"]])
        bits = np.fromfile(path, kind, (last - first) // kind.itemsize, offset=start + first)
        yield name, decode(bits).reshape(entry["shape"])


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> stored bits; bfloat16 rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if dtype == "float32":
        return bits
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(bits: np.ndarray) -> np.ndarray:
    """Stored bits -> float32."""
    return (bits.astype(np.uint32) << 16 if bits.itemsize == 2 else bits).view(np.float32)


def write_model(folder: Path, shape: Shape, dtype: str, number: int) -> None:
    """Write model `number` (0: the base), complete or not at all."""
    tensors = shape.tensors()
    code = _CODES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dims in tensors.items():
        size = int(np.prod(dims)) * np.dtype(_UNSIGNED[code]).itemsize
        header[name] = {"dtype": code, "shape": dims, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = folder.with_name(folder.name + ".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    with (unfinished / "model.safetensors").open("wb") as file, ThreadPoolExecutor(2) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        jobs = ((index, name, dims, number) for index, (name, dims) in enumerate(tensors.items()))
        for values in pool.map(lambda job: _values(*job), jobs):
            file.write(encode(values, dtype).data)
    (unfinished / "config.json").write_text(json.dumps(shape.config(dtype), indent=2))
    unfinished.rename(folder)


def _values(index: int, name: str, dims: tuple[int, ...], number: int) -> np.ndarray:
    """Tensor `index` of model `number`: the same numbers on every machine."""
    base = _normal((index, 0), dims) * np.float32(BASE)
    if name.endswith("norm.weight"):
        base += 1
    return base + _normal((index, number), dims) * np.float32(CHANGE) if number else base


def _normal(seed: tuple[int, int], dims: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.SFC64(seed)).standard_normal(dims, np.float32)
