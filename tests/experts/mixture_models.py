"""Tiny random mixtures of experts of five families, as transformers 5 makes and saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

EXPERTS = 8
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", "Mixtral", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe", "Qwen3Moe",
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
         "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "deepseek_v3": (
        "DeepseekV3", "DeepseekV3",
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2,
         "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4,
         "num_nextn_predict_layers": 0},
    ),
    "gpt_oss": (
        "GptOss", "GptOss",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "llama4": (
        "Llama4Text", "Llama4",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48,
         "interleave_moe_layer_step": 1, "attention_chunk_size": 32},
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
_ODD: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "phimoe": ("Phimoe", "Phimoe", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "minimax_m2": (
        "MiniMaxM2", "MiniMaxM2", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe", "Ernie4_5_Moe",
        {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    ),
}  # fmt: skip
"""Families whose routers are called otherwise in files than in memory, or have their bias somewhere else."""


def mixture(family: str, seed: int = 0, **more: Any) -> Any:
    """A model whose routers have opinions, and whose biases are none of them zero."""
    import transformers

    config_name, model_name, own = {**_FAMILIES, **_ODD}[family]
    config = getattr(transformers, f"{config_name}Config")(**{**_SIZES, **own, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{model_name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("router.weight", "mlp.gate.weight")):
                value.normal_(0, 0.5)
            elif name.endswith("embed_tokens.weight"):
                value.normal_()  # tokens are unlike
            elif name.endswith("bias") or ".experts." in name:
                value.normal_(0, 0.1)
    return model


def mixture_saved(folder: Path, family: str, seed: int = 0, **more: Any) -> Path:
    mixture(family, seed, **more).save_pretrained(folder)
    return folder


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The folder with other weights."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a folder as transformers loads it; nothing may be missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        out: torch.Tensor = model.eval()(ids).logits
    return out


IDS = torch.arange(3, 43)[None]
