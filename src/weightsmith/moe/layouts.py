"""Mixture-of-experts architectures: how they call their tensors, and what their config.json says.

Tensors are stored as the published checkpoints of an architecture are, one per expert: transformers (4 and 5), vLLM
and llama.cpp read that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LAYOUTS", "MLP", "Facts", "Layout", "choose", "config_json"]

MLP = ("gate_proj", "up_proj", "down_proj")
"""What the dense families (Llama, Mistral, Qwen2, Qwen3) call the three matrices of an MLP."""

_LLAMA = frozenset({"llama", "mistral"})
_DROPPED = (
    *("architectures", "model_type", "auto_map", "mlp_bias", "layer_types", "pretraining_tp", "_name_or_path"),
    *("use_sliding_window", "max_window_layers", "sliding_window", "attention_bias"),
)
"""Fields of a dense model's config that a mixture's does not have, or says in its own way."""


@dataclass(frozen=True)
class Layout:
    """One architecture.

    holds        model types of dense models whose attention it has a place for
    class_name   for `architectures`; `model_type` as transformers calls it
    block        the module that stands where the MLP was
    words        the dense names of the three matrices -> its own
    shared       the always-on expert's module within `block`; '' if it has none
    shared_gate  the tensor that weighs it; '' if it is added as it is
    shares       least and greatest number of shared experts
    correction   a bias of the router that starts at zero; '' if it has none
    biased       field that says whether q, k and v have biases; '' if they may not
    normed       whether q and k are normalised: True, False, or a field that says so
    sigmoid      scores are sigmoids of what a router's rows have in common with a token, not their softmax
    foreign      what the user has to know where transformers has no such class; '' where it has
    """

    name: str
    holds: frozenset[str]
    class_name: str
    model_type: str
    block: str = "mlp"
    words: Mapping[str, str] = field(default_factory=lambda: dict(zip(MLP, MLP, strict=True)))
    shared: str = ""
    shared_gate: str = ""
    shares: tuple[int, int] = (0, 0)
    correction: str = ""
    biased: str = ""
    normed: bool | str = False
    sigmoid: bool = False
    foreign: str = ""


LAYOUTS: Mapping[str, Layout] = {
    each.name: each
    for each in (
        Layout(
            "mixtral",
            _LLAMA,
            "MixtralForCausalLM",
            "mixtral",
            block="block_sparse_moe",
            words={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        ),
        Layout(
            "qwen",
            _LLAMA | {"qwen2"},
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            shared="shared_expert",
            shared_gate="shared_expert_gate.weight",
            shares=(1, 1),
            biased="qkv_bias",
        ),
        Layout("qwen3", frozenset({"qwen3"}), "Qwen3MoeForCausalLM", "qwen3_moe", normed=True),
        Layout(
            "glm4_moe",
            _LLAMA | {"qwen2", "qwen3"},
            "Glm4MoeForCausalLM",
            "glm4_moe",
            shared="shared_experts",
            shares=(1, 64),
            correction="gate.e_score_correction_bias",
            biased="attention_bias",
            normed="use_qk_norm",
            sigmoid=True,
        ),
        Layout(
            "deepseek",
            _LLAMA,
            "DeepseekForCausalLM",
            "deepseek",
            shared="shared_experts",
            shares=(0, 64),
            foreign="transformers has no class for DeepseekForCausalLM (its DeepseekV2 and V3 have another attention): "
            "it needs its publisher's code there; glm4_moe is the same layout in a class of transformers",
        ),
    )
}
"""In the order in which they are tried: what transformers can load comes first."""


@dataclass(frozen=True)
class Facts:
    """What the config follows from, besides the base's own: sizes and counts.

    model_type      of the base
    experts         how many, of which `chosen` are used per token
    size            rows of an expert's gate_proj
    shared          how many shared experts; `shared_size` rows of all of them together
    biased, normed  whether the attention has biases on q, k and v, and norms on q and k
    """

    model_type: str
    experts: int
    chosen: int
    size: int
    shared: int = 0
    shared_size: int = 0
    biased: bool = False
    normed: bool = False

    @property
    def packed_shares(self) -> int:
        """How many experts of `size` the shared ones amount to (architectures count them so)."""
        return self.shared_size // self.size


def choose(wanted: str | None, facts: Facts, further: Callable[[Layout], list[str]]) -> tuple[Layout | None, list[str]]:
    """The layout by name, or the first that can hold the inputs; else None and what stands in the way.

    further  what else stands in the way of one, a line each
    """
    if wanted is not None:
        layout = LAYOUTS[wanted]
        return layout, obstacles(layout, facts) + further(layout)
    whys = []
    for layout in LAYOUTS.values():
        found = obstacles(layout, facts) + further(layout)
        if not found:
            return layout, []
        whys += found if facts.model_type in layout.holds else []
    if not whys:
        known = sorted({kind for layout in LAYOUTS.values() for kind in layout.holds})
        whys = [f"no architecture here can hold experts of {facts.model_type!r} models; known: {', '.join(known)}"]
    return None, whys


def obstacles(layout: Layout, facts: Facts) -> list[str]:
    """Why an architecture cannot hold the inputs, a line each."""
    found = []
    if facts.model_type not in layout.holds:
        found.append(f"{layout.name} holds {', '.join(sorted(layout.holds))} models; the base is {facts.model_type!r}")
    low, high = layout.shares
    if not low <= facts.shared <= high:
        wanted = {(0, 0): "has no shared experts", (1, 1): "needs exactly one shared expert"}
        found.append(f"{layout.name} {wanted.get(layout.shares, f'needs at least {low} shared experts')}; "
                     f"the recipe has {facts.shared}")  # fmt: skip
    if layout.name in ("deepseek", "glm4_moe") and facts.shared_size % facts.size:
        found.append(f"{layout.name} needs shared experts of the experts' size {facts.size}, not {facts.shared_size}")
    if layout.name == "glm4_moe" and facts.experts < 2:
        found.append("glm4_moe needs at least 2 experts")
    if facts.biased and not layout.biased:
        found.append(f"{layout.name} has no place for the biases of the base's attention")
    if facts.normed and layout.normed is False:
        found.append(f"{layout.name} has no place for the norms of the base's queries and keys")
    if not facts.normed and layout.normed is True:
        found.append(f"{layout.name} needs norms of queries and keys, which the base does not have")
    return found


def config_json(base: Mapping[str, Any], layout: Layout, facts: Facts, dtype: str | None) -> str:
    """The mixture's config.json, from the base's fields."""
    kept = {name: value for name, value in base.items() if name not in _DROPPED}
    config = {"architectures": [layout.class_name], "model_type": layout.model_type, **kept}
    config |= {"num_experts_per_tok": facts.chosen, "output_router_logits": False}
    config |= _own_fields(layout, facts, config)
    if layout.biased:
        config[layout.biased] = facts.biased
    if isinstance(layout.normed, str):
        config[layout.normed] = facts.normed
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in base and "dtype" not in base else "dtype"] = dtype
    return json.dumps(config, indent=2) + "\n"


def _own_fields(layout: Layout, facts: Facts, config: Mapping[str, Any]) -> dict[str, Any]:
    """What only this architecture's config says.  Weights of the chosen experts always sum to one."""
    sparse = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "moe_intermediate_size": facts.size,
    }
    plain = {"sliding_window": None, "use_sliding_window": False}
    match layout.name:
        case "mixtral":
            return {"num_local_experts": facts.experts, "intermediate_size": facts.size, "sliding_window": None}
        case "qwen":
            return {
                **{**sparse, **plain, "num_experts": facts.experts},
                **{"shared_expert_intermediate_size": facts.shared_size, "intermediate_size": facts.size},
            }
        case "qwen3":
            return {**sparse, **plain, "num_experts": facts.experts, "attention_bias": False}
    fields: dict[str, Any] = {
        **{"n_routed_experts": facts.experts, "moe_intermediate_size": facts.size, "norm_topk_prob": True},
        **{"first_k_dense_replace": 0, "n_shared_experts": facts.packed_shares or None},
    }
    if layout.name == "deepseek":
        code = "deepseek-ai/deepseek-moe-16b-base--"  # transformers has no class of its own for this one
        mapped = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
        mapped |= dict.fromkeys(["AutoModel"], "modeling_deepseek.DeepseekModel")
        mapped |= dict.fromkeys(["AutoModelForCausalLM"], "modeling_deepseek.DeepseekForCausalLM")
        auto = {name: code + place for name, place in mapped.items()}
        return {**fields, "moe_layer_freq": 1, "scoring_func": "softmax", "attention_bias": False, "auto_map": auto}
    # transformers rotates half of each head here unless told otherwise
    rope = config.get("rope_parameters")
    whole = {"rope_parameters": {**rope, "partial_rotary_factor": 1.0}} if isinstance(rope, dict) else {}
    return {
        **{**fields, **whole, "partial_rotary_factor": 1.0, "routed_scaling_factor": 1.0},
        **{"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    }
