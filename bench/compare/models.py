"""Tiny random models that transformers makes: two kinds of several parts, and one with tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write_hearing", "write_saying", "write_seeing"]

_TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
_WORDS = ["<s>", "</s>", "<unk>", *(f"word{i}" for i in range(20))]
_OWN = (("grey", "blue"), ("blue", "green", "<|im_start|>", "<|im_end|>"), ("red", "grey", "<|eot_id|>"))


def write_seeing(folder: Path, seed: int) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    _write(Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config=vision), folder, seed)


def write_hearing(folder: Path, seed: int) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **{"vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "num_mel_bins": 8},
        **{"max_source_positions": 20, "max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    )
    _write(WhisperForConditionalGeneration, config, folder, seed)


def write_saying(folder: Path, seed: int) -> None:
    """A model whose tokenizer has words of its own behind those that all have."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*_WORDS, *(w for w in _OWN[seed] if not w.startswith("<|"))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(w, special=True) for w in _OWN[seed] if w.startswith("<|")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    config = LlamaConfig(**{**_TEXT, "vocab_size": len(wrapped)}, bos_token_id=0, eos_token_id=1)
    _write(LlamaForCausalLM, config, folder, seed)


def _write(kind: Any, config: Any, folder: Path, seed: int) -> None:
    """The base of a kind is seed 0; the others are a little off it, where it has as many rows."""
    import torch

    torch.manual_seed(0)
    model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters() if seed else ():
            value += 0.01 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(folder)
