"""Small models of several architectures, as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as t

_TEXT: dict[str, Any] = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
_TEXT |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 50}
_EXPERTS = {**_GROUPED, "num_local_experts": 4}
_VIT = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8}

FAMILIES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED, attention_bias=True)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**_GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**_GPT2)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_TEXT)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_EXPERTS)),
    "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**_EXPERTS, head_dim=8)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**_TEXT, ffn_dim=48, word_embed_proj_dim=40)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**_TEXT)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**_VIT, patch_size=4)),
}


def saved(family: str, folder: Path, seed: int = 0) -> Path:
    """A model whose norms and biases are not at the neutral values of a fresh one."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
