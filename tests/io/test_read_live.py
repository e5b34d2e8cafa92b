"""Adapters on models as they are on disk: the model that a source shows computes what the running adapter computes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weightsmith.io.read.experts import laid_out_like
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
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


def granite_moe() -> torch.nn.Module:
    sizes = {name: value for name, value in TEXT.items() if name != "head_dim"}
    return tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**sizes, num_local_experts=3))


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[Maker, dict[str, Any]]] = {
    # A tied head stays what it was, unless the adapter names it.
    "tied: embedding saved": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied: head saved": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied: both saved": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied: embedding": (tied, {"target_modules": ["embed_tokens"]}),
    "tied: head": (tied, {"target_modules": ["lm_head"]}),
    "tied: both": (tied, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied for good: embedding": (tied, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied for good: saved": (
        tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "tied: tokens": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}),
    "tied: tokens of the head": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 3]}}),
    "tied: unlike tokens": (
        tied, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 7]}}
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}),
    "tied head of another name": (gemma3, {"target_modules": ["embed_tokens", "q_proj", "fc1"]}),
    # Names in memory are not those in the files.
    "Gemma 3": (gemma3, {"target_modules": ["q_proj", "o_proj", "fc1"]}),
    "Qwen2.5-VL": (qwen_vl, {"target_modules": ["q_proj", "qkv", "down_proj"]}),
    "ViT": (vit, {"target_modules": ["q_proj", "fc1", "o_proj"], "modules_to_save": ["classifier"]}),
    "Swin, by transformers": (swin, {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}),
    "GPT-NeoX": (neox, {"target_modules": ["lm_head", "query_key_value"]}),
    # Square weights of layers that store them either way.
    "both orientations": (vision_to_text, {"target_modules": ["q_attn", "q_proj", "v_proj", "c_attn", "c_proj"]}),
    "both orientations, all square": (vision_to_text, {"target_modules": ["q_attn", "q_proj", "v_proj"]}),
    "one square Conv1D": (gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    # Fused experts.
    "Mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": FUSED}),
    "Mixtral, one parameter": (mixtral, {"target_modules": ["q_proj"], "target_parameters": FUSED[1:]}),
    "Mixtral, old names": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "Qwen3-MoE, square": (qwen_moe, {"target_modules": ["q_proj"], "target_parameters": FUSED, "use_rslora": True}),
    "GPT-OSS": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": FUSED}),
    "GPT-OSS, square": (lambda: gpt_oss(16), {"target_modules": ["q_proj"], "target_parameters": FUSED[1:]}),
    "Granite MoE": (
        granite_moe, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
}  # fmt: skip


def outputs(model: torch.nn.Module) -> Tensor:
    given: dict[str, Tensor] = {"input_ids": TOKENS}
    if model.config.model_type in ("vit", "swin"):
        given = {"pixel_values": PIXELS}
    elif model.config.is_encoder_decoder:
        given = {"pixel_values": PIXELS.expand(2, -1, -1, -1), "decoder_input_ids": TOKENS}
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found


def trained(folder: Path, base: torch.nn.Module, config: peft.PeftConfig) -> Tensor:
    """Save a random adapter of `base`; return what the running model computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        found = outputs(model)
        model.save_pretrained(folder)
    return found


def stored(folder: Path, source: Source) -> Path:
    """The folder of the model that a source shows."""
    folder.mkdir()
    tensors = {name: source.read(name).contiguous().clone() for name in source.keys}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(config_of(source) or "{}")
    return folder


def made(make: Maker, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = make().eval()
        base.save_pretrained(folder)
    return base


@pytest.mark.parametrize("case", CASES)
def test_live_logits(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base = made(make, tmp_path / "base")
    want = trained(tmp_path / "adapter", base, peft.LoraConfig(r=2, lora_alpha=6, **config))
    source = open_source(tmp_path / "base")
    shown = laid_out_like(open_source(tmp_path / "adapter", base=source), source)
    got = type(base).from_pretrained(stored(tmp_path / "out", shown)).eval()
    assert float((outputs(base) - want).abs().max()) > 0.01
    torch.testing.assert_close(outputs(got), want, rtol=1e-5, atol=1e-5)
    own_head = "tied" in case and "for good" not in case and not case.endswith(": tokens")
    assert len(shown.keys) == len(source.keys) + own_head
    if "tied" in case:
        assert json.loads(config_of(shown) or "")["tie_word_embeddings"] is not own_head


# --- modules of torch --------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, padding=1)
        self.point = torch.nn.Conv2d(6, 6, 1)
        self.line = torch.nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.point(self.conv(x)).flatten(2))


class Flat(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 8)
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.embed(x)))


IMAGE = torch.linspace(-1, 1, 4 * 5 * 5).reshape(1, 4, 5, 5)
LORA = {"r": 2, "lora_alpha": 6}
MODULES: dict[str, tuple[type[torch.nn.Module], Tensor, peft.PeftConfig]] = {
    "attention": (
        Attention, torch.linspace(-1, 1, 48).reshape(2, 3, 8), peft.LoraConfig(**LORA, target_modules=["attn"])
    ),
    "convolutions": (Convolutions, IMAGE, peft.LoraConfig(**LORA, target_modules=["conv", "point", "line"])),
    "DoRA of convolutions": (
        Convolutions, IMAGE, peft.LoraConfig(**LORA, use_dora=True, target_modules=["conv", "point"])
    ),
    "LoHa": (Flat, TOKENS[:, :5] % 12, peft.LoHaConfig(r=2, alpha=6, target_modules=["up", "down"])),
    "LoHa of convolutions": (Convolutions, IMAGE, peft.LoHaConfig(r=2, alpha=6, target_modules=["conv", "point"])),
    "LoHa with cores": (
        Convolutions, IMAGE, peft.LoHaConfig(r=2, alpha=6, use_effective_conv2d=True, target_modules=["conv"])
    ),
    "LoKr": (Flat, TOKENS % 12, peft.LoKrConfig(r=2, alpha=6, target_modules=["up", "down"])),
    "LoKr, both low": (
        Flat, TOKENS % 12, peft.LoKrConfig(r=1, alpha=6, decompose_both=True, decompose_factor=4, target_modules=["up"])
    ),
    "LoKr, whole": (Flat, TOKENS % 12, peft.LoKrConfig(r=64, alpha=6, target_modules=["up", "down"])),
    "LoKr of convolutions": (Convolutions, IMAGE, peft.LoKrConfig(r=1, alpha=6, target_modules=["conv"])),
    "LoKr with cores": (
        Convolutions, IMAGE, peft.LoKrConfig(r=1, alpha=6, use_effective_conv2d=True, target_modules=["conv"])
    ),
    "tokens alone": (Flat, TOKENS % 12, peft.TrainableTokensConfig(token_indices=[4, 1], target_modules=["embed"])),
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_live_outputs_of_modules(case: str, tmp_path: Path) -> None:
    make, given, config = MODULES[case]
    torch.manual_seed(0)
    base = make().eval()
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        want = model(given)
        model.save_pretrained(tmp_path)
        shown = open_source(tmp_path, base=MemorySource(base.state_dict(), "base"))
        got = make().eval()
        got.load_state_dict({name: shown.read(name) for name in shown.keys})
        assert float((base(given) - want).abs().max()) > 0.01
        torch.testing.assert_close(got(given), want, rtol=1e-5, atol=1e-5)
    for name in shown.keys:
        if (pair := shown.factors(name, shown.source)) is not None:
            left, right = pair.read()
            assert left.shape[1] == pair.rank
            torch.testing.assert_close(left @ right, shown.read(name) - base.state_dict()[name], rtol=1e-4, atol=1e-5)
        whole = shown.read(name)
        for row in range(shown.key(name).rows):
            assert torch.equal(shown.read(name, row, row + 1), whole[row : row + 1])
