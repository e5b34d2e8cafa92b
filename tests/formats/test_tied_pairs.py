"""Tied heads of models that embed positions too, or call their embedding otherwise: against the models themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weightsmith as ws
from lora.peft_models import adapter, gpt2, loaded, logits
from weightsmith.io.architectures import TEXT_TO_TEXT, TIED_BY_DEFAULT

HEAD = "lm_head.weight"


def opt() -> torch.nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()


MODELS = {"gpt2": (gpt2, "transformer.wte.weight"), "opt": (opt, "model.decoder.embed_tokens.weight")}
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}, {"embed"}),
    ("gpt2", {"target_modules": ["wte"]}, {"embed"}),
    ("gpt2", {"target_modules": ["lm_head"]}, {"head"}),
    # peft ties for good only what is called embed_tokens or lm_head.
    ("gpt2", {"target_modules": ["wte"], "ensure_weight_tying": True}, {"embed"}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True}, {"embed"}),
    ("opt", {"target_modules": ["embed_tokens"]}, {"embed"}),
    ("opt", {"target_modules": ["q_proj", "lm_head"]}, {"head"}),
]


def unsaid(path: Path) -> None:
    config = json.loads(path.read_text())
    assert config.pop("tie_word_embeddings") is True
    path.write_text(json.dumps(config))


def live(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tie_word_embeddings is False
    return logits(model.eval())


@pytest.mark.parametrize(("name", "config", "changed"), CASES)
@pytest.mark.parametrize("said", [True, False])
def test_an_adapter_of_one_of_a_tied_pair(
    said: bool, name: str, config: dict[str, Any], changed: set[str], tmp_path: Path
) -> None:
    """Also where config.json leaves it to the default of transformers, as those of GPT-2 and OPT do."""
    make, embed = MODELS[name]
    make().save_pretrained(tmp_path / "base")
    if not said:
        unsaid(tmp_path / "base/config.json")
    path = adapter(tmp_path / "a", make, 1, **{"r": 2, "lora_alpha": 8, **config})
    ws.merge({"a": path}, "task_arithmetic", tmp_path / "base", out=tmp_path / "out")
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after[embed], before[embed]) is ("embed" not in changed)
    assert torch.equal(after[HEAD], before[embed]) is ("head" not in changed)
    want = logits(loaded(make, {"a": path}))
    assert (want - logits(make())).abs().max() > 0.01
    torch.testing.assert_close(live(tmp_path / "out"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["tied", "free"])
def test_a_tied_and_an_untied_model(name: str, first: str, tmp_path: Path) -> None:
    make, embed = MODELS[name]
    model = make()
    model.save_pretrained(tmp_path / "tied")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.5)
    model.save_pretrained(tmp_path / "free")
    order = (first, "free" if first == "tied" else "tied")
    ws.merge({kind: tmp_path / kind for kind in order}, "average", out=tmp_path / "out")
    after, table = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "tied/model.safetensors")[embed]
    torch.testing.assert_close(after[embed], table)
    torch.testing.assert_close(after[HEAD], table + 0.25)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    live(tmp_path / "out")


def test_the_defaults_are_those_of_transformers() -> None:
    """Of every model type that gives logits of tokens."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    tasks = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "PRETRAINING")
    named = (getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in tasks)
    kinds = set(CONFIG_MAPPING).intersection(*[set().union(*named)]) - {"gemma4_assistant"}  # has no default config
    ties = {kind for kind in kinds if getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", None) is True}
    assert len(ties) > 100
    assert ties == TIED_BY_DEFAULT
    assert {"encoder-decoder", "fsmt"} == TEXT_TO_TEXT - TIED_BY_DEFAULT
