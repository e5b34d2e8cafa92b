"""Tiny models of families whose names, layers or experts differ between memory and files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as tf

Maker = Callable[[], torch.nn.Module]
TOKENS = torch.arange(1, 13).reshape(2, 6)
PIXELS = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
TEXT = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "head_dim": 8, "tie_word_embeddings": False}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}


def llama(**more: Any) -> torch.nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, **more}))


def tied() -> torch.nn.Module:
    return llama(tie_word_embeddings=True)


def gemma3() -> torch.nn.Module:
    text = {**TEXT, "tie_word_embeddings": True}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    )


def qwen_vl() -> torch.nn.Module:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    ids = {f"{name}_token_id": 40 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_scaling": MROPE}, vision_config=vision, **ids)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def vit() -> torch.nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION))


def swin() -> torch.nn.Module:
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return tf.SwinForImageClassification(tf.SwinConfig(**sizes))


def neox() -> torch.nn.Module:
    sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(num_hidden_layers=1, **sizes))


def vision_to_text() -> torch.nn.Module:
    """Linear layers in the encoder, Conv1D in the decoder, square ones in both."""
    text = tf.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True, is_decoder=True,
                         bos_token_id=1, eos_token_id=2)  # fmt: skip
    both = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), text)
    return tf.VisionEncoderDecoderModel(both)


def gpt2() -> torch.nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    )


def mixtral(inner: int = 12) -> torch.nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**{**TEXT, "intermediate_size": inner}, num_local_experts=3))


def qwen_moe() -> torch.nn.Module:
    more = {"moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **more))


def gpt_oss(inner: int = 12) -> torch.nn.Module:
    more = {"num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**{**TEXT, "intermediate_size": inner}, **more))


def llama4(inner: int = 12) -> torch.nn.Module:
    """Experts stored [in, out] as those of GPT-OSS, which peft takes for [out, in]; square where inner is 16."""
    more = {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**{**TEXT, "intermediate_size": inner}, **more))


def qwen_vl_moe(inner: int = 16) -> torch.nn.Module:
    """Published files hold experts [in, out], those of transformers 5 [out, in]; square ones are read as the latter."""
    text = {**TEXT, "moe_intermediate_size": inner, "num_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    text["rope_parameters"] = {"rope_theta": 1e4, **MROPE}
    return tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def granite_moe() -> torch.nn.Module:
    sizes = {name: value for name, value in TEXT.items() if name != "head_dim"}
    return tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**sizes, num_local_experts=3))


def outputs(model: torch.nn.Module) -> Tensor:
    given: dict[str, Tensor] = {"input_ids": TOKENS}
    if model.config.model_type in ("vit", "swin"):
        given = {"pixel_values": PIXELS}
    elif model.config.model_type == "whisper":
        given = {"input_features": torch.linspace(-1, 1, 512).reshape(2, 8, 32), "decoder_input_ids": TOKENS}
    elif model.config.model_type == "t5":
        given |= {"decoder_input_ids": TOKENS}
    elif model.config.is_encoder_decoder:
        given = {"pixel_values": PIXELS.expand(2, -1, -1, -1), "decoder_input_ids": TOKENS}
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found


def made(make: Maker, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = make().eval()
        base.save_pretrained(folder)
    return base
