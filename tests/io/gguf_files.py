"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

HEADS, KV_HEADS, HIDDEN, MLP, VOCAB, LAYERS = 4, 2, 32, 64, 64, 2


def tensors(arch: str = "llama", seed: int = 0) -> dict[str, torch.Tensor]:
    """A dense model's state dict under Hugging Face's names."""
    torch.manual_seed(seed)
    kv = HIDDEN * KV_HEADS // HEADS
    out = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        out |= {p + "input_layernorm.weight": (HIDDEN,), p + "post_attention_layernorm.weight": (HIDDEN,)}
        out |= {p + "self_attn.q_proj.weight": (HIDDEN, HIDDEN), p + "self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
        out |= {p + f"self_attn.{n}_proj.weight": (kv, HIDDEN) for n in "kv"}
        out |= {p + f"mlp.{n}_proj.weight": (MLP, HIDDEN) for n in ("gate", "up")}
        out |= {p + "mlp.down_proj.weight": (HIDDEN, MLP)}
        if arch == "qwen2":
            out |= {p + "self_attn.q_proj.bias": (HIDDEN,), **{p + f"self_attn.{n}_proj.bias": (kv,) for n in "kv"}}
        if arch == "qwen3":
            out |= {p + f"self_attn.{n}_norm.weight": (HIDDEN // HEADS,) for n in "qk"}
    return {name: torch.randn(shape) for name, shape in out.items()}


_NAMES = {
    **{"embed_tokens": "token_embd", "lm_head": "output", "input_layernorm": "attn_norm"},
    **{"post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"},
    **{"o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    **{"q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "norm": "output_norm"},
}


def gguf_name(name: str) -> str:
    *_, part, kind = name.split(".")
    block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    return f"{block}{_NAMES[part]}.{kind}"


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as the converter orders them for llama."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write(path: Path, state: dict[str, torch.Tensor], arch: str = "llama", dtype: str = "F32", split: int = 0) -> Path:
    """Write a file, or with `split` one for every so many tensors: path-00001-of-00003.gguf, ..."""
    import gguf

    writer = gguf.GGUFWriter(str(path), arch, split_max_tensors=split)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, value in state.items():
        array = value.numpy()
        if arch == "llama" and ".self_attn." in name and ("q_proj" in name or "k_proj" in name):
            array = permuted(array, HEADS if "q_proj" in name else KV_HEADS)
        here = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), here)
        writer.add_tensor(gguf_name(name), data, raw_dtype=here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
