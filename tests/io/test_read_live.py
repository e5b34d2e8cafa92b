"""Adapters on models as they are on disk: the model that a source shows computes what the running adapter computes."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.families import (
    TOKENS,
    Maker,
    gemma3,
    gpt2,
    gpt_oss,
    granite_moe,
    llama,
    llama4,
    made,
    mixtral,
    neox,
    outputs,
    qwen_moe,
    qwen_vl,
    qwen_vl_moe,
    swin,
    tied,
    vision_to_text,
    vit,
)
from weightsmith.io.architectures import CONV1D_NAMES, RENAMED
from weightsmith.io.read.experts import laid_out_like, packed_like_memory
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers as tf

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
    "tied: tokens of the head, said to be tied": (
        tied,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 3]}, "ensure_weight_tying": True},
    ),
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
    "GPT-OSS, biases": (
        lambda: gpt_oss(8),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj_bias"]},
    ),
    "Llama 4, square": (lambda: llama4(16), {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "Qwen3-VL-MoE, square": (qwen_vl_moe, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "Granite MoE": (
        granite_moe, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
}  # fmt: skip


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


def test_what_is_stated_of_architectures_is_what_transformers_does(tmp_path: Path) -> None:
    """Names in memory, layers stored [in, out], output layers: the tables against shells of the models."""
    for i, make in enumerate((llama, gpt2, gemma3, qwen_vl, vit, neox, mixtral, vision_to_text)):
        made(make, tmp_path / str(i))
        stated = Modules(packed_like_memory(open_source(tmp_path / str(i))))
        shell = stated.shell
        assert shell is not None
        assert stated.output_layer == shell.output_layer
        assert stated.config["model_type"] in RENAMED or make is vision_to_text
        for name in packed_like_memory(open_source(tmp_path / str(i))).keys:
            assert stated.in_memory(name) == shell.renamed(name)
            kind = shell.kind(shell.renamed(name).removesuffix(".weight"))
            if kind in ("linear", "conv1d"):
                assert stated.flipped(name.removesuffix(".weight")) is (kind == "conv1d")
    models = Path(tf.__file__).parent / "models"
    texts = {path: path.read_text() for path in models.glob("*/modeling_*.py")}
    found = {path.parent.name: re.findall(r"self\.(\w+) = Conv1D\(", text) for path, text in texts.items()}
    found = {name: words for name, words in found.items() if words}
    assert set(found) == {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai"}, "CONV1D lacks some"
    assert {word for words in found.values() for word in words} <= CONV1D_NAMES


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
