"""The matrices of attention heads, as a reader of the residual stream sees them.

Row vectors: a head reads x W_V and writes x W_V W_O; it attends by x_i W_Q R(distance) W_K^T x_j^T.  Where folding is
asked for, the gain of the norm before the attention is in W_Q, W_K and W_V, and the writing of models with LayerNorm is
centred, as the next norm takes its mean away.  Biases are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.align.attention import Shape, rotated, shape_of
from weightsmith.align.parts import Model
from weightsmith.align.parts import Tensor as Part
from weightsmith.core.errors import SourceError
from weightsmith.core.keys import layer_of
from weightsmith.core.lazy import torch
from weightsmith.io.architectures import GAIN_PLUS_ONE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Heads", "Place", "Rotation", "centred", "heads_of", "places", "rotation"]

_BEFORE = re.compile(
    r"input_layernorm|ln_?1|layernorm_before|layer_norm1|self_attn_layer_norm|attention_norm|attn_norm|norm1"
    r"|pre_attention_layernorm|ln_attn"
)
"""What norms before an attention are called."""


@dataclass(frozen=True, eq=False)
class Heads:
    """All heads of one layer, float64, one matrix per query head (those of a group share keys and values).

    q, k  [heads, entries, width]: W_Q and W_K, transposed;  v  [heads, entries, width]: W_V, transposed
    o     [heads, entries, width]: W_O
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True, eq=False)
class Place:
    """Where the heads of one layer are stored.

    weights  'q', 'k', 'v' or 'qkv', and 'o' -> the tensor;  norm: the gain before the attention, '' where there is none
    """

    layer: int
    module: str
    shape: Shape
    weights: Mapping[str, Part]
    norm: str

    @property
    def count(self) -> int:
        """Query heads."""
        return self.shape.kv * self.shape.group


@dataclass(frozen=True)
class Rotation:
    """Rotary position embeddings of the first `turned` entries of a head, pairs (i, i + turned / 2)."""

    turned: int
    base: float

    def matrix(self, width: int, distance: float) -> Tensor:
        """R with q R k^T the score of a query `distance` tokens behind its key: [width, width] float64."""
        half = self.turned // 2
        angles = distance * self.base ** -(torch.arange(half, dtype=torch.float64) / half)
        found = torch.eye(width, dtype=torch.float64)
        first, second = torch.arange(half), torch.arange(half) + half
        found[first, first] = found[second, second] = torch.cos(angles)
        # a query is turned by its position, a key by its own: q R(i) (k R(j))^T = q R(i - j) k^T
        found[first, second], found[second, first] = torch.sin(angles), -torch.sin(angles)
        return found


def places(model: Model) -> list[Place]:
    """The attentions of a model's blocks, from the first on.

    Raises SourceError for models whose heads the names and shapes do not tell, or with several attentions in a block.
    """
    found: dict[int, Place] = {}
    for module, tensors in model.by_module("q", "k", "v", "qkv", "o").items():
        weights = {t.part: t for t in tensors if t.into is not None}
        layer = layer_of(f"{module}.weight")
        if layer is None or "o" not in weights:
            continue
        width = weights["o"].outputs
        count = model.heads(width)
        shape = None if not count else shape_of(weights, weights["o"].inputs, count)
        if shape is None:
            raise SourceError(f"{model.source}: the heads of {module} are not those that config.json describes")
        if layer[1] in found:
            raise SourceError(f"{model.source}: {module} and {found[layer[1]].module} are attentions of one block")
        found[layer[1]] = Place(layer[1], module, shape, weights, _norm_before(model, module, width))
    if not found:
        raise SourceError(f"{model.source}: no attention with queries, keys, values and an output was found")
    return [found[layer] for layer in sorted(found)]


def heads_of(model: Model, place: Place, fold: bool = True) -> Heads:
    """Read one layer's heads.  Raises SourceError where a norm is to be folded and none stands before the attention."""
    s, weights = place.shape, place.weights

    def rows(part: str, start: int, every: int, width: int, count: int) -> Tensor:
        """[count, width, model width] of a matrix with its outputs first: `every` entries for each, from `start` on."""
        tensor = model.source.read(weights[part].key.name).double()
        tensor = tensor if weights[part].out == 0 else tensor.T
        return torch.stack([tensor[start + i * every : start + i * every + width] for i in range(count)])

    heads = place.count
    if "qkv" in weights and "query_key_value" in weights["qkv"].key.name:
        unit = (s.group + 2) * s.value
        both = rows("qkv", 0, unit, unit, s.kv)
        q = both[:, : s.group * s.value].reshape(heads, s.value, -1)
        k, v = both[:, s.group * s.value : -s.value], both[:, -s.value :]
    elif "qkv" in weights:
        after = heads * s.query
        q = rows("qkv", 0, s.query, s.query, heads)
        k = rows("qkv", after, s.key, s.key, s.kv)
        v = rows("qkv", after + s.kv * s.key, s.value, s.value, s.kv)
    else:
        q, k, v = (rows(p, 0, w, w, n) for p, w, n in (("q", s.query, heads), ("k", s.key, s.kv), ("v", s.value, s.kv)))
    output = model.source.read(weights["o"].key.name).double()
    o = (output if weights["o"].out == 1 else output.T).reshape(heads, s.value, -1)
    k, v = (t.repeat_interleave(s.group, dim=0) for t in (k, v))
    if fold:
        if not place.norm:
            raise SourceError(f"{place.module}: no norm stands before it, so no gain can be folded into what it reads")
        gain = model.source.read(place.norm).double()
        gain = gain + 1 if model.config.get("model_type") in GAIN_PLUS_ONE else gain
        q, k, v = q * gain, k * gain, v * gain
        o = o - o.mean(dim=-1, keepdim=True) if centred(model) else o
    return Heads(place.layer, q, k, v, o)


def centred(model: Model) -> bool:
    """Whether norms take the mean away (LayerNorm), or divide only (RMSNorm)."""
    scopes = (model.config, *(v for v in model.config.values() if isinstance(v, dict)))
    return not any("rms_norm_eps" in scope for scope in scopes)


def rotation(model: Model, width: int) -> Rotation | None:
    """The rotation of queries and keys; None for models without.

    Raises SourceError for rotations that are scaled or laid out in another way.
    """
    turned = rotated(model, width)
    if not turned:
        return None
    config = model.config
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    said = said if isinstance(said, dict) else {}
    kind = said.get("rope_type", said.get("type", "default"))
    base = said.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10000.0)))
    if kind != "default" or not isinstance(base, (int, float)) or "rotary_dim" in config:
        raise SourceError(f"{model.source}: its rotary position embeddings ({kind}) are not the plain ones")
    return Rotation(turned, float(base))


def _norm_before(model: Model, module: str, width: int) -> str:
    stack = layer_of(f"{module}.weight")
    assert stack is not None
    block = f"{stack[0]}.{stack[1]}"
    found = [
        t.key.name
        for t in model.within(block)
        if t.part == "norm" and t.key.shape == (width,) and t.key.name.endswith("weight")
        and _BEFORE.fullmatch(t.key.name.removesuffix(".weight").rpartition(".")[2])
    ]  # fmt: skip
    return found[0] if len(found) == 1 else ""
