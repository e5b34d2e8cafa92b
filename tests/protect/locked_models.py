"""Small models of the architectures whose layouts differ, and how they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import Tensor

_TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
_TEXT |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_LONG = {"max_position_embeddings": 4096}
_GROUPED = {**_TEXT, **_LONG, "num_key_value_heads": 2}
_LATENT = {**_TEXT, **_LONG, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4}
_LATENT |= {"qk_nope_head_dim": 6, "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4}
_LATENT |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}

MODELS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED, attention_bias=True)),
    "wide_heads": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**_GROUPED, "hidden_size": 64, "head_dim": 32})),
    "part_of_wide_heads": lambda: t.StableLmForCausalLM(t.StableLmConfig(**{**_GROUPED, "hidden_size": 64})),
    "one_kv_head": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**_GROUPED, "num_key_value_heads": 1})),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**_GROUPED)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_TEXT, **_LONG)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, vocab_size=60)),
    "deepseek": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**_LATENT)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**_TEXT)),
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A model whose norms and biases are not at the neutral values of a fresh one."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


def answers(folder: Path) -> list[Tensor]:
    """Logits of a padded batch, of tokens far behind the first, and of decoding with a cache."""
    name = "AutoModelForMaskedLM" if "Bert" in (folder / "config.json").read_text() else "AutoModelForCausalLM"
    model = getattr(t, name).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # on the left, as generation pads
    mask[2, 15:] = 0
    with torch.no_grad():
        found = [model(input_ids=ids, attention_mask=mask).logits[mask.bool()]]
        if name == "AutoModelForMaskedLM":
            return found
        last = model.config.max_position_embeddings
        places = torch.arange(last - 20, last).expand_as(ids)
        whole = torch.ones_like(ids)  # without a mask, positions that jump are taken for several texts
        found.append(model(input_ids=ids, attention_mask=whole, position_ids=places, use_cache=False).logits)
        far, mask = torch.tensor([[0, 1, 2, 3, last - 3, last - 2, last - 1]]), whole[:1, :7]
        found.append(model(input_ids=ids[:1, :7], attention_mask=mask, position_ids=far, use_cache=False).logits)
        out = model(input_ids=ids[:, :10], use_cache=True)
        for i in range(10, 14):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


def moved(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
