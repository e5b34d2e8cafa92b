"""Slices of two models on top of each other, for every architecture as transformers builds it.

The oracle is the same surgery on the modules themselves: the blocks moved by hand into one of the models, with
what lies above them from the other; both must compute the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from weightsmith.jobs.merge import run
from weightsmith.recipe.load import loads

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
KV = {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
      "eos_token_id": 2}  # fmt: skip
WORDS = torch.tensor([[5, 7, 9, 11, 3, 8]])


@dataclass(frozen=True)
class Architecture:
    """How to build one, where its blocks and what lies above them are, and what it is asked.

    types   the kinds of the three layers, where the config lists them
    """

    build: Callable[[], Any]
    blocks: tuple[str, ...]
    above: tuple[str, ...] = ()
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: {"input_ids": WORDS})
    types: tuple[str, ...] = ()
    counts: tuple[str, ...] = ("num_hidden_layers",)
    generates: bool = False


def causal(name: str, types: tuple[str, ...] = (), **more: Any) -> Architecture:
    """A decoder in Llama's layout."""

    def build() -> Any:
        config = getattr(hf, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")(**SIZES, **{**KV, **more})
        return getattr(hf, f"{name}ForCausalLM")(config)

    return Architecture(build, ("model.layers",), ("model.norm", "lm_head"), types=types, generates=True)


SLIDE, FULL = "sliding_attention", "full_attention"
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
TEXT = SIZES | {"max_position_embeddings": 32}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": causal("Llama"),
    "mistral": causal("Mistral", sliding_window=3),
    "qwen2": causal("Qwen2", (FULL, SLIDE, SLIDE), use_sliding_window=True, sliding_window=2, max_window_layers=1),
    "qwen3": causal("Qwen3", (FULL, FULL, FULL)),
    "gemma2": causal("Gemma2", (SLIDE, FULL, SLIDE), sliding_window=2),
    "gemma3": causal("Gemma3", (SLIDE, FULL, SLIDE), sliding_window=2, layer_types=[SLIDE, FULL, SLIDE]),
    "phi3": causal("Phi3"),
    "gpt2": Architecture(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32,
                                                 bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)),
        ("transformer.h",), ("transformer.ln_f", "lm_head"), counts=("n_layer",), generates=True,
    ),
    "bert": Architecture(lambda: hf.BertModel(hf.BertConfig(**TEXT)), ("encoder.layer",), ("pooler",)),
    "roberta": Architecture(lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)), ("encoder.layer",), ("pooler",)),
    "vit": Architecture(
        lambda: hf.ViTModel(hf.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **IMAGE)),
        ("layers",), ("layernorm", "pooler"), PIXELS,
    ),
    "clip": Architecture(
        lambda: hf.CLIPModel(hf.CLIPConfig(
            text_config={**TEXT, "eos_token_id": 2}, projection_dim=8,
            vision_config={k: v for k, v in SIZES.items() if k != "vocab_size"} | IMAGE)),
        ("text_model.encoder.layers", "vision_model.encoder.layers"),
        ("text_model.final_layer_norm", "vision_model.post_layernorm", "visual_projection", "text_projection",
         "logit_scale"),
        {"input_ids": WORDS, **PIXELS}, counts=("text_config.num_hidden_layers", "vision_config.num_hidden_layers"),
    ),
    "t5": Architecture(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=3, num_heads=2,
            decoder_start_token_id=0)),
        ("encoder.block", "decoder.block"), ("encoder.final_layer_norm", "decoder.final_layer_norm"),
        {"input_ids": WORDS, "decoder_input_ids": WORDS}, counts=("num_layers", "num_decoder_layers"), generates=True,
    ),
    "whisper": Architecture(
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None)),
        ("model.encoder.layers", "model.decoder.layers"), ("model.encoder.layer_norm", "model.decoder.layer_norm"),
        {"input_features": torch.linspace(-1, 1, 8 * 20).reshape(1, 8, 20), "decoder_input_ids": WORDS},
        counts=("encoder_layers", "decoder_layers"),
    ),
    "mamba": Architecture(
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, state_size=4,
                                                   tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
                                                   eos_token_id=2)),
        ("backbone.layers",), ("backbone.norm_f", "lm_head"), generates=True,
    ),
}  # fmt: skip


def made(architecture: Architecture, seed: int) -> Any:
    """A random model; every tensor differs from the other seed's, norms and biases too."""
    torch.manual_seed(seed)
    model = architecture.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def by_hand(architecture: Architecture, first: Any, second: Any) -> Any:
    """Blocks 0 and 1 of the first model, then 1 and 2 of the second; what lies above is the second's."""
    model = copy.deepcopy(first)
    for path in architecture.blocks:
        below, above = first.get_submodule(path), second.get_submodule(path)
        stacked = nn.ModuleList(copy.deepcopy([below[0], below[1], above[1], above[2]]))
        replace(model, path, stacked)
        for i, block in enumerate(stacked):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = i
    for path in architecture.above:
        parent, _, name = path.rpartition(".")
        replace(model, path, copy.deepcopy(getattr(second.get_submodule(parent), name)))
    for path in architecture.counts:
        *scope, name = path.split(".")
        config = model.config
        for word in scope:
            config = getattr(config, word)
        setattr(config, name, 4)
    if architecture.types:
        model.config.layer_types = [architecture.types[i] for i in (0, 1, 1, 2)]
    return model


def replace(model: Any, path: str, module: nn.Module | nn.Parameter) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        caches = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
        out = model(**inputs, **caches)
    found = [out[name] for name in ("logits", "last_hidden_state", "pooler_output", "logits_per_text") if name in out]
    assert found
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacked_as_by_hand(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    models = {letter: made(architecture, seed) for letter, seed in (("A", 1), ("B", 2))}
    for letter, model in models.items():
        model.save_pretrained(tmp_path / letter)
    config = f"""
slices:
  - sources: [{{model: {tmp_path}/A, layer_range: [0, 2]}}]
  - sources: [{{model: {tmp_path}/B, layer_range: [1, 3]}}]
merge_method: passthrough
"""
    run(loads(config, "stack.yml"), tmp_path / "out")
    loaded = type(models["A"]).from_pretrained(tmp_path / "out").eval()
    wanted = by_hand(architecture, models["A"], models["B"])
    for got, want, plain in zip(
        answer(loaded, architecture.inputs),
        answer(wanted, architecture.inputs),
        answer(models["A"], architecture.inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, plain, atol=1e-3), "the stacked model is no other than the first"
    if architecture.types:
        assert list(loaded.config.layer_types) == [architecture.types[i] for i in (0, 1, 1, 2)]
    if architecture.generates:
        made_up = loaded.generate(WORDS, max_new_tokens=4, do_sample=False)
        assert made_up.shape[1] > 1
