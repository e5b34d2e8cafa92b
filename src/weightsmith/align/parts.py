"""The parts of a transformer by its tensors' names and shapes: what reads the residual stream, what writes it.

`core.keys.role_of` knows most parts by a module's last name.  Here the place counts too: `dense` and `c_proj` are the
attention's output in an attention, and an MLP's elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightsmith.core.keys import Key, layer_of
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source

__all__ = ["READS", "WRITES", "Model", "Tensor", "attention_of", "field"]

READS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "router", "head")
"""Parts with the residual stream as inputs."""
WRITES = ("o", "down")
"""Parts with the residual stream as outputs."""

_QK_NORM = re.compile(r"(q|k|query|key)_?(layer_?|ln)?(norm)?")
_LAST = ("dense", "c_proj", "wo", "proj", "projection", "fc_out")  # outputs of an attention or of an MLP
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True)
class Tensor:
    """One tensor and what it is.

    part    a role, 'qk_norm', 'other', or 'table' for masks and frequencies that old files hold: they have no units
    module  of an MLP or attention, the name that its tensors have in common; else its own module
    out     the axis of a weight's outputs, or a bias's only one
    into    the axis of a weight's inputs; None of a bias
    packed  all experts of a module in one: axis 0 counts them
    """

    key: Key
    part: str
    module: str
    out: int = 0
    into: int | None = None
    packed: bool = False

    @property
    def outputs(self) -> int:
        return self.key.shape[self.out]

    @property
    def inputs(self) -> int:
        assert self.into is not None
        return self.key.shape[self.into]


class Model:
    """A model's tensors by part; experts are shown packed."""

    def __init__(self, source: Source) -> None:
        self.source = packed_like_memory(source)
        self.modules = Modules(self.source)
        self.tensors = [self._tensor(key) for key in self.source.keys.values() if key.floating]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.modules.config

    def by_module(self, *parts: str, packed: bool = False) -> dict[str, list[Tensor]]:
        """Module -> its tensors of some parts."""
        found: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            if tensor.part in parts and tensor.packed == packed:
                found.setdefault(tensor.module, []).append(tensor)
        return found

    def within(self, module: str) -> list[Tensor]:
        """All tensors whose names begin with a module's."""
        return [t for t in self.tensors if t.key.name.startswith(f"{module}.")]

    @cached_property
    def widths(self) -> set[int]:
        """Sizes of the residual streams: what attentions and MLPs inside the blocks read."""
        readers = ("q", "qkv", "up", "gate", "gate_up")
        return {t.inputs for t in self.tensors if t.part in readers and t.into is not None and layer_of(t.key.name)}

    def heads(self, width: int) -> int | None:
        """The number of query heads of a stack with this residual stream, as config.json says it."""
        scopes = [self.config, *(v for v in self.config.values() if isinstance(v, dict))]
        said = [(field(scope, _WIDTHS), field(scope, _HEADS)) for scope in scopes]
        found = {n for w, n in said if n is not None and w == width} or {n for _, n in said if n is not None}
        return found.pop() if len(found) == 1 else None

    def _tensor(self, key: Key) -> Tensor:
        part, module = _part(key)
        axes = len(key.shape)
        name = key.name.rpartition(".")[2]
        packed = module.endswith(".experts") and axes == (2 if name.endswith("_bias") else 3)
        if packed:
            if name.endswith("_bias"):
                return Tensor(key, part, module, 1, None, True)
            flipped = bool(self.modules.experts_flipped(key))
            return Tensor(key, part, module, 2 if flipped else 1, 1 if flipped else 2, True)
        if axes != 2 or part in ("embed", "norm", "qk_norm", "other"):
            return Tensor(key, part, module)
        flipped = bool(self.modules.flipped(key.name.rpartition(".")[0]))
        return Tensor(key, part, module, 1 if flipped else 0, 0 if flipped else 1)


def field(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The first whole number that a configuration has under one of some names."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def attention_of(name: str) -> str | None:
    """The attention that a tensor belongs to: its name up to the first component that says so; None outside."""
    words = name.split(".")
    found = next((i for i, word in enumerate(words) if re.search(r"attn|attention", word.lower())), None)
    return None if found is None else ".".join(words[: found + 1])


def _part(key: Key) -> tuple[str, str]:
    """Part and module of a tensor."""
    words = [w for w in key.name.split(".") if w not in ("weight", "bias")]
    last = words[-1]
    owner = ".".join(words[:-1])
    attention = attention_of(key.name)
    mask = len(key.shape) == 4 and key.shape[:2] == (1, 1) and key.shape[2] == key.shape[3]
    if mask or last == "inv_freq":
        return "table", attention or owner
    if _QK_NORM.fullmatch(last) and ("norm" in last or "ln" in last):
        return "qk_norm", attention or owner
    if "norm" in last.lower():
        return "norm", attention or owner
    role = key.role
    if role == "o" and attention is None:  # T5's DenseReluDense.wo
        role = "down"
    if role == "other" and last in _LAST and layer_of(key.name) is not None:
        role = "o" if attention is not None else "down"
    if role == "other" and "experts" in words:
        role = {"gate_up_proj_bias": "gate_up", "down_proj_bias": "down"}.get(last, role)
    if role in ("q", "k", "v", "qkv", "o") and attention is not None:
        return role, attention
    if attention is not None and role != "embed":
        return ("head" if role == "head" else "other"), attention
    if role in ("gate", "up", "gate_up", "down"):
        return role, _without(words, ("dense", "output", "intermediate"), owner)
    return role, owner


def _without(words: list[str], ends: tuple[str, ...], owner: str) -> str:
    """The module of an MLP's tensor: without its last name, and without BERT's two (`intermediate.dense`)."""
    if words[-1] != "dense":
        return owner
    while words and words[-1] in ends:
        words = words[:-1]
    return ".".join(words)
