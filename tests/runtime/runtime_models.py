"""Tiny models of transformers with weights large enough that attention matters."""

from __future__ import annotations

from typing import Any

import torch

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 100,
    "initializer_range": 0.2,
}
_NO_TOKENS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
_LATENT = {
    **{name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
    **{"intermediate_size": 96, "moe_intermediate_size": 32, "num_key_value_heads": 4, "initializer_range": 0.2},
    **{"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3},
}
_GPT2 = {"n_embd": 64, "n_layer": 5, "n_head": 4, "vocab_size": 100, "n_positions": 400, "initializer_range": 0.2}


def tiny(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model of a kind, in eval mode, without tokens that end a text."""
    import transformers as t

    torch.manual_seed(seed)
    made = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **_NO_TOKENS, **changes})),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**{**SMALL, **_NO_TOKENS, **changes})),
        "phi": lambda: t.PhiForCausalLM(
            t.PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, **_NO_TOKENS, **changes)
        ),
        "glm": lambda: t.GlmForCausalLM(t.GlmConfig(**{**SMALL, **_NO_TOKENS, **changes})),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**{**SMALL, **_NO_TOKENS, **changes})),
        "deepseek": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**_LATENT, **_NO_TOKENS, **changes})),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**{**_GPT2, **_NO_TOKENS, **changes})),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=16, num_layers=1, num_heads=2, vocab_size=50)),
    }[kind]
    return made().eval()


def prompts(lengths: tuple[int, ...], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens of several lengths, padded on the left, with tokens too: what is masked must not matter."""
    ids = torch.randint(1, 100, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], count: int, **more: Any) -> Any:
    """Greedy tokens and the logits of each step."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **more}
    return model.generate(**inputs, max_new_tokens=count, **options)


def gap(one: Any, other: Any) -> float:
    """The largest difference of two runs' logits, which must have chosen the same tokens."""
    assert torch.equal(one.sequences, other.sequences)
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))
