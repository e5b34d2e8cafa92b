"""What a tensor is called, how large it is, and what its name implies.  No data, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

__all__ = [
    "COUNTERS",
    "DTYPES",
    "LOGITS_BIAS",
    "ROLES",
    "RULE_ROLES",
    "STATISTICS",
    "DType",
    "Key",
    "Part",
    "depths",
    "gathered",
    "good_name",
    "layer_of",
    "plays",
    "role_of",
]


@dataclass(frozen=True, slots=True)
class DType:
    """A storage format: its torch name, its safetensors code, bytes per element, and whether it merges."""

    name: str
    code: str
    itemsize: int
    floating: bool


DTYPES: Mapping[str, DType] = {
    d.name: d
    for d in (
        DType("float64", "F64", 8, True),
        DType("float32", "F32", 4, True),
        DType("float16", "F16", 2, True),
        DType("bfloat16", "BF16", 2, True),
        DType("float8_e4m3fn", "F8_E4M3", 1, True),
        DType("float8_e5m2", "F8_E5M2", 1, True),
        DType("int64", "I64", 8, False),
        DType("int32", "I32", 4, False),
        DType("int16", "I16", 2, False),
        DType("int8", "I8", 1, False),
        DType("uint64", "U64", 8, False),
        DType("uint32", "U32", 4, False),
        DType("uint16", "U16", 2, False),
        DType("uint8", "U8", 1, False),
        DType("bool", "BOOL", 1, False),
    )
}


@dataclass(frozen=True)
class Key:
    """Name, shape and dtype (a torch dtype's name, e.g. 'bfloat16') of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        """Length of the first axis; a 0-dim tensor is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        """Elements per row."""
        return math.prod(self.shape[1:])

    @property
    def floating(self) -> bool:
        return DTYPES[self.dtype].floating

    @property
    def role(self) -> str:
        return role_of(self.name)

    @property
    def layer(self) -> int | None:
        """Index of the block this tensor belongs to, or None outside the blocks."""
        found = layer_of(self.name)
        return None if found is None else found[1]


@dataclass(frozen=True)
class Part:
    """One stored piece of an encoded tensor.

    name    what the codec calls it ('tau', 'mask')
    key     full name, shape and dtype under which it is stored
    span    elements of the encoded tensor that one row of the part stands for; cuts fall on multiples of it.
            0: any element needs all of the part (codecs of TENSOR grain only)
    expert  whose it is; '' if all experts share it
    """

    name: str
    key: Key
    span: int
    expert: str = ""

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """The part's rows that cover flat positions start..stop of the tensor."""
        return (start // self.span, -(-stop // self.span)) if self.span else (0, self.key.rows)

    @classmethod
    def of(cls, key: Key, name: str, shape: tuple[int, ...], span: int, expert: str = "") -> Part:
        """A floating part of the tensor `key`, in its dtype; bfloat16 where that has 8 bits: changes are small."""
        dtype = "bfloat16" if DTYPES[key.dtype].itemsize == 1 else key.dtype
        return cls(name, Key(f"{key.name}::{name}" + (f".{expert}" if expert else ""), shape, dtype), span, expert)


# What a name component says.  Words are those of the Hugging Face families (Llama, Qwen, Mistral, Gemma, Phi,
# GPT-2/NeoX, BERT, ViT/CLIP, T5, Whisper) and timm.  Plain words: patterns would take a short run a while to compile.
_ROLES: tuple[tuple[str, str], ...] = (
    ("norm", ""),
    ("head", "lm_head embed_out classifier score head output_projection"),
    ("embed", "embed_tokens embedding embeddings wte wpe embed_in shared embed_positions pos_embed"),
    ("qkv", "qkv qkv_proj query_key_value c_attn in_proj_weight in_proj_bias wqkv"),
    ("q", "q_proj query q wq to_q q_lin"),
    ("k", "k_proj key k wk to_k k_lin"),
    ("v", "v_proj value v wv to_v v_lin"),
    ("o", "o_proj out_proj o wo to_out out_lin"),
    ("router", "router gate shared_expert_gate"),
    ("gate_up", "gate_up_proj"),
    ("gate", "gate_proj w1 wi_0"),
    ("up", "up_proj w3 wi_1 fc1 c_fc wi intermediate dense_h_to_4h lin1"),
    ("down", "down_proj w2 fc2 dense_4h_to_h lin2"),
)
_ROLE_OF_WORD = {word: role for role, words in _ROLES for word in words.split()}
# Components that say it together with those before them: BERT and ViT, NeoX and Falcon, GPT-2, timm, T5.
_CHAINS: tuple[tuple[str, str], ...] = (
    ("head", r"(.*\.)?predictions\.decoder|decoder|(.*\.)?(vocab_projector|generator_lm_head)"),
    ("o", r"(.*\.)?\w*att(n|ention)\w*\.(output\.)?(dense|c_proj|proj)"),
    ("norm", r"(.*\.)?\d+\.(.*\.)?LayerNorm"),
    ("down", r"(.*\.)?\d+\.output\.dense|(.*\.)?DenseReluDense\.wo"),
)
_CHAIN_PATTERNS = tuple((role, re.compile(pattern)) for role, pattern in _CHAINS)
ROLES: tuple[str, ...] = (*(role for role, _ in _ROLES), "other")

# Parts of models that see and hear (LLaVA, Qwen-VL and -Omni, InternVL, Gemma 3, Ultravox, ...); a connector may lie
# in an encoder, as `visual.merger` does, and is the connector then.
_SENSES: tuple[tuple[str, str], ...] = (
    ("connector", r"\w*(projector|connector|merger|resampler|aligner)|(visual|vision|audio|video)_proj\w*"),
    ("vision", r"visual\w*|vision\w*|image\w*"),
    ("audio", r"audio\w*|speech\w*|sound\w*"),
    ("video", r"video\w*"),
)
_SENSE_PATTERNS = tuple((sense, re.compile(pattern)) for sense, pattern in _SENSES)
RULE_ROLES: tuple[str, ...] = (*ROLES, *(sense for sense, _ in _SENSES), "bias")
"""What a rule may call `role`: also the part of a model that sees or hears, and biases, besides the role itself."""


STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance", "cluster_size", "embed_avg")
"""What a model calls numbers that it gathered while it was trained, in place of training them: of BatchNorm, and of
codebooks."""
COUNTERS = ("num_batches_tracked",)
"""What it calls the numbers of batches behind them."""


LOGITS_BIAS = "final_logits_bias"
"""BART's: [1, tokens], where all other tensors have a row per token."""


def gathered(name: str) -> bool:
    """Whether a tensor holds running statistics or their counter."""
    return name.rpartition(".")[2] in (*STATISTICS, *COUNTERS)


def good_name(name: str) -> bool:
    """Whether a file may call a tensor so: at most 1000 characters, none that ends a line or drives a terminal."""
    return len(name) <= 1000 and name.isprintable()


@lru_cache(maxsize=65536)
def role_of(name: str) -> str:
    """Return the part a tensor plays ('q', 'down', 'norm', 'embed', ...), or 'other' if the name does not say.

    Components are read from the right, so `model.layers.0.self_attn.q_proj.bias` is 'q'.
    """
    module = name.removesuffix(".weight").removesuffix(".bias")
    for role, pattern in _CHAIN_PATTERNS:
        if pattern.fullmatch(module):
            return role
    for component in reversed(name.split(".")):
        if component in ("weight", "bias") or component.isdigit():
            continue
        if role := _component_role(component):
            return role
    return "other"


def _component_role(component: str) -> str:
    """What one component of a name says, or ''."""
    word = component.replace("_", "a").isalnum()
    if "norm" in component or (word and component.startswith("ln")):
        return "norm"
    if word and component.endswith(("_embedding", "_embeddings")):
        return "embed"
    return _ROLE_OF_WORD.get(component, "")


@lru_cache(maxsize=65536)
def plays(name: str, role: str) -> bool:
    """Whether a tensor plays a part of `RULE_ROLES`: `visual.blocks.0.attn.qkv.bias` is 'qkv', 'vision' and 'bias'."""
    if role == "bias":
        return name.rpartition(".")[2] == "bias"
    components = name.split(".")
    sense = next((s for s, pattern in _SENSE_PATTERNS if any(map(pattern.fullmatch, components))), "")
    return role in (role_of(name), sense)


@lru_cache(maxsize=65536)
def layer_of(name: str) -> tuple[str, int] | None:
    """Return (stack, index), e.g. ('model.layers', 5), or None for a tensor outside the blocks.

    The block number is the first numeric component that does not count experts, so
    `layers.5.mlp.experts.0.w1` is block 5 of `layers` and `encoder.block.11` is not block 1.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and i > 0 and parts[i - 1] != "experts":
            return ".".join(parts[:i]), int(part)
    return None


def depths(names: Iterable[str]) -> dict[str, float]:
    """Map each name inside a stack of blocks to its depth: 0 for the first block, 1 for the last.

    Each stack (encoder, decoder, vision tower) is measured on its own; a stack of one block has depth 1.
    Names outside all stacks are left out.
    """
    found = {name: layer_of(name) for name in names}
    last: dict[str, int] = {}
    for place in found.values():
        if place is not None:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    return {
        name: 1.0 if last[place[0]] == 0 else place[1] / last[place[0]]
        for name, place in found.items()
        if place is not None
    }
