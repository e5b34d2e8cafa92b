"""Adapters that mlx-lm 0.32.2 wrote, against the logits that it gives with them (mlx_files, recorded on a CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from kit import texts
from lora.peft_models import TOKENS, quiet
from weightsmith.core.errors import WeightsmithError
from weightsmith.lora.merge import merge

FILES = Path(__file__).parent / "mlx_files"


def base(folder: Path, tied: bool) -> Path:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    tensors = load_file(FILES / "base.safetensors")
    save_file({n: t for n, t in tensors.items() if not (tied and n == "lm_head.weight")}, folder / "model.safetensors")
    return folder


def adapter(folder: Path, name: str, **more: Any) -> Path:
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes((FILES / f"{name}.safetensors").read_bytes())
    config = {
        "fine_tune_type": "dora" if name == "dora" else "lora",
        "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 20.0},
        "model": "base",
        "num_layers": 1,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
    return folder


@pytest.mark.parametrize("name", ["lora", "dora", "embed"])
def test_an_adapter_of_mlx_lm(name: str, tmp_path: Path) -> None:
    """Of linear layers, output layers and embeddings; a tied embedding stays tied, and gives the logits too."""
    from transformers import AutoModelForCausalLM

    place = base(tmp_path / "base", tied=name == "embed")
    ws.merge({"a": adapter(tmp_path / "a", name)}, "task_arithmetic", place, out=tmp_path / "out")
    want = load_file(FILES / "logits.safetensors")[name]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval() for folder in ("base", "out")]
    with torch.no_grad():
        before, after = (model(TOKENS).logits for model in models)
    assert (before - want).abs().max() > 0.005
    torch.testing.assert_close(after, want, atol=1e-6, rtol=1e-5)


def test_one_becomes_an_adapter_of_peft(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    place = base(tmp_path / "base", tied=False)
    merge({"a": adapter(tmp_path / "a", "lora")}, "linear", tmp_path / "out")
    with quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), tmp_path / "out").eval()
        after = model(TOKENS).logits
    torch.testing.assert_close(after, load_file(FILES / "logits.safetensors")["lora"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"fine_tune_type": "full"}, "'full' of mlx-lm is not read, only lora and dora"),
        ({"lora_parameters": {"rank": 2, "alpha": 16}}, "lora_parameters.scale is None"),
    ],
)
def test_what_is_not_read(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    place = base(tmp_path / "base", tied=False)
    with pytest.raises(WeightsmithError, match=said):
        ws.merge({"a": adapter(tmp_path / "a", "lora", **more)}, "task_arithmetic", place, out=tmp_path / "out")


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    place, path = base(tmp_path / "base", tied=False), adapter(tmp_path / "a", "lora")
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    parts = {f"{name}.lora_a": torch.ones(4, 2, 8), f"{name}.lora_b": torch.ones(4, 12, 2)}
    save_file(parts, path / "adapters.safetensors")
    with pytest.raises(WeightsmithError, match="all experts of a layer in one tensor"):
        ws.merge({"a": path}, "task_arithmetic", place, out=tmp_path / "out")


def test_an_alpha_beside_the_scale_is_said(tmp_path: Path) -> None:
    place = base(tmp_path / "base", tied=False)
    path = adapter(tmp_path / "a", "lora", lora_parameters={"rank": 2, "alpha": 16, "scale": 20.0})
    tree = {"base": str(place), "models": {"a": str(path)}, "method": "task_arithmetic"}
    result = ws.Recipe.model_validate(tree).run(tmp_path / "out")
    assert any("alpha 16 beside scale 20" in text for text in texts(result.warnings))
