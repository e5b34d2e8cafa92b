"""Merges of adapters as a user runs them: heads, vocabularies, tokenizers and modules that come with an adapter."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightsmith as ws
from kit import texts
from tokens.test_one_vocabulary import tokenizer_at
from weightsmith.core.errors import PlanError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers as tf

SIZES = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = torch.arange(1, 11)[None]
BAKE = {"method": "task_arithmetic"}


def llama(folder: Path, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "bos_token_id": 0, "eos_token_id": 1, **more})).eval()
    model.save_pretrained(folder)
    return model


def trained(folder: Path, base: torch.nn.Module, seed: int = 1, given: Tensor = TOKENS, **config: Any) -> Tensor:
    """Save a random adapter of `base`; return what the running model computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**{"target_modules": ["q_proj"], **config})
        ).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            found: Tensor = model(given).logits
        model.save_pretrained(folder)
    return found


def merged(folder: Path, models: dict[str, Any], **tree: Any) -> ws.Result:
    tree = {"base": "base", **BAKE, **tree}
    tree = {k: str(folder / v) if k == "base" else v for k, v in tree.items() if v}
    models = {name: str(folder / ref) if isinstance(ref, str) else ref for name, ref in models.items()}
    shutil.rmtree(folder / "out", ignore_errors=True)
    return ws.Recipe.model_validate({**tree, "models": models}).run(folder / "out")


def logits(cls: Any, folder: Path) -> Tensor:
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_classifier_on_a_language_model(tied: bool, tmp_path: Path) -> None:
    llama(tmp_path / "base", tie_word_embeddings=tied)
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    classifier.config.pad_token_id = 0
    want = trained(tmp_path / "adapter", classifier, task_type="SEQ_CLS")
    result = merged(tmp_path, {"a": "adapter"})
    assert any(
        "trained score.weight, which the base lacks: the result is a classifier" in w for w in texts(result.warnings)
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], len(config["id2label"])) == (["LlamaForSequenceClassification"], 5)
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(logits(tf.AutoModelForSequenceClassification, tmp_path / "out"), want)


CLASSIFIERS = {
    "tokens, GPT-2": (
        (tf.GPT2LMHeadModel, tf.GPT2Config, {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
        tf.GPT2ForTokenClassification,
        {"task_type": "TOKEN_CLS", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    # Two layers: peft trains `pre_classifier` too, whose name ends in `classifier`.
    "sequences, DistilBERT": (
        (tf.DistilBertModel, tf.DistilBertConfig, {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}),
        tf.DistilBertForSequenceClassification,
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]},
    ),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_trained_classifier_of_another_kind(kind: str, tmp_path: Path) -> None:
    (cls, config, sizes), head, adapter = CLASSIFIERS[kind]
    torch.manual_seed(0)
    cls(config(vocab_size=12, bos_token_id=0, eos_token_id=1, **sizes)).save_pretrained(tmp_path / "base")
    want = trained(tmp_path / "adapter", head.from_pretrained(tmp_path / "base", num_labels=3), **adapter)
    merged(tmp_path, {"a": "adapter"})
    torch.testing.assert_close(logits(head, tmp_path / "out"), want)


def test_a_head_is_as_trained_whatever_the_weight(tmp_path: Path) -> None:
    """Another adapter beside it, weights, trimming: the one head that there is stays what it is."""
    base = llama(tmp_path / "base")
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    trained(tmp_path / "adapter", classifier, task_type="SEQ_CLS")
    trained(tmp_path / "other", base, 2, task_type="CAUSAL_LM")
    merged(tmp_path, {"a": {"model": str(tmp_path / "adapter"), "weight": 0.5}, "b": "other"}, method="ties")
    head = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["score.weight"], head)


def test_a_grown_vocabulary_and_the_way_out(tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    model.resize_token_embeddings(16)
    want = trained(tmp_path / "adapter", model, modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(PlanError, match=r"12 rows in base and 16 in a; .* or merge it alone into its base \(models: "):
        merged(tmp_path, {"a": "adapter"})
    alone = {"model": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")}
    merged(tmp_path, {"x": alone}, base="", method="passthrough")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 16
    torch.testing.assert_close(logits(tf.AutoModelForCausalLM, tmp_path / "out"), want)


def test_an_adapters_own_tokenizer_and_template(tmp_path: Path) -> None:
    words = ["<s>", "</s>", "<unk>", "red", "blue", "green", "<|end|>"]
    model = llama(tmp_path / "base")
    tokenizer_at(tmp_path / "base", words)
    trained(tmp_path / "adapter", model)
    tokenizer_at(tmp_path / "adapter", words)
    settings = tmp_path / "adapter/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "<|end|>"}))
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages }}")
    lost = texts(merged(tmp_path, {"a": "adapter"}).warnings)
    assert any("a has a chat template, the result will have none (chat_template: a takes it)" in text for text in lost)
    assert any("a ends with '<|end|>', the result's tokenizer with '</s>' (tokenizer: a takes its)" in t for t in lost)
    assert not (tmp_path / "out/chat_template.jinja").exists()
    result = merged(tmp_path, {"a": "adapter"}, tokenizer="a")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    assert any(
        "ends with '<|end|>' (6), generation_config.json stops at 1, config.json stops at 1: set eos" in t
        for t in texts(result.warnings)
    )
    merged(tmp_path, {"a": "adapter"}, chat_template="a")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


def with_modules(folder: Path, value: float) -> None:
    """Sentence-Transformers' files: the transformer here, then pooling and a dense layer in folders of their own."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    found = [{"idx": i, "name": str(i), "path": path, "type": f"x.{kind}"} for i, (path, kind) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(found))
    for path, _ in kinds[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text('{"pooling_mode": "mean"}')
    save_file({"linear.weight": torch.full((2, 16), value)}, folder / "2_Dense/model.safetensors")


def test_modules_trained_beside_an_adapter_are_taken(tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    with_modules(tmp_path / "base", 1.0)
    for seed, name in enumerate("abc"):
        trained(tmp_path / name, model, seed)
    with_modules(tmp_path / "a", 7.0)
    with_modules(tmp_path / "b", 8.0)
    merged(tmp_path, {"c": "c", "a": "a"})  # c has its base's
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"]
    assert bool((dense == 7.0).all())
    merged(tmp_path, {"a": "a", "b": "b"})
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"]
    assert bool((dense == 1.0 + 6.0 + 7.0).all())


def test_modules_beside_an_adapter_that_does_not_list_them(tmp_path: Path) -> None:
    """What peft saves has no modules.json; the dense layer that was trained lies in its folder all the same."""
    model = llama(tmp_path / "base")
    with_modules(tmp_path / "base", 1.0)
    trained(tmp_path / "a", model)
    with_modules(tmp_path / "a", 7.0)
    (tmp_path / "a/modules.json").unlink()
    merged(tmp_path, {"a": "a"})
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"]
    assert bool((dense == 7.0).all())


def test_modules_that_the_base_lacks_are_taken_whole(tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    for seed, name in enumerate("ab"):
        trained(tmp_path / name, model, seed)
    with_modules(tmp_path / "a", 7.0)
    with_modules(tmp_path / "b", 8.0)
    result = merged(tmp_path, {"a": "a"})
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"]
    assert bool((dense == 7.0).all())
    assert any("taken from a as trained there, whatever its weight" in text for text in texts(result.warnings))
    made = json.loads((tmp_path / "out/weightsmith.json").read_text())
    assert made["companions"]["modules"] == ["2_Dense/model.safetensors"]
    result = merged(tmp_path, {"a": "a", "b": "b"})
    assert any("taken from a, which was trained with them; those of b are dropped" in t for t in texts(result.warnings))


def test_an_adapter_that_names_another_base(tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    trained(tmp_path / "a", model)
    path = tmp_path / "a/adapter_config.json"
    for said, found in (("org/quite-another", True), ("org/Base", False), (str(tmp_path / "base"), False), ("", False)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": said}))
        said = texts(merged(tmp_path, {"a": "a"}).warnings)
        assert any("says it was trained on 'org/quite-another', and is put on" in text for text in said) is found


def test_an_adapter_of_a_quantised_base(tmp_path: Path) -> None:
    """By the base's config.json where it lies here, also under the same name; else by its name."""
    model = llama(tmp_path / "base")
    trained(tmp_path / "a", model)
    coded = llama(tmp_path / "mlx/base").config.to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    (tmp_path / "mlx/base/config.json").write_text(json.dumps(coded))
    path = tmp_path / "a/adapter_config.json"
    for name, found in ((str(tmp_path / "mlx/base"), True), ("org/base-4bit", True), ("org/Base", False)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
        said = texts(merged(tmp_path, {"a": "a"}).warnings)
        assert any(", a quantised model, and is put on" in text for text in said) is found


def test_patterns_that_match_one_module_twice(tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    trained(tmp_path / "a", model, r=4, lora_alpha=4)
    path = tmp_path / "a/adapter_config.json"
    patterns = {"layers.0.self_attn.q_proj": 2, "q_proj": 8}
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": patterns}))
    (text,) = (w for w in texts(merged(tmp_path, {"a": "a"}).warnings) if "matched by" in w)
    assert text.startswith(
        "a: model.layers.0.self_attn.q_proj: matched by alpha_pattern 'layers.0.self_attn.q_proj' (scale 0.5)"
    )
    assert "and 'q_proj' (scale 2); 'layers.0.self_attn.q_proj' counts, the first in the file" in text
    back = load_file(tmp_path / "out/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    factors = load_file(tmp_path / "a/adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_%s.weight"
    want = (
        model.state_dict()["model.layers.0.self_attn.q_proj.weight"] + 0.5 * factors[name % "B"] @ factors[name % "A"]
    )
    torch.testing.assert_close(back, want)


def test_lora_of_single_experts_on_fused_ones(tmp_path: Path) -> None:
    """As adapters were made before transformers 5: the same as on a base that stores its experts one by one."""
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(**SIZES, num_key_value_heads=2, head_dim=8, moe_intermediate_size=8, num_experts=3,
                               num_experts_per_tok=2, tie_word_embeddings=False)  # fmt: skip
    model = tf.Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    module = "model.layers.0.mlp.experts.{}.{}_proj"
    sizes = {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}
    tensors: dict[str, Tensor] = {}
    for expert in (0, 2):
        for name, (outputs, inputs) in sizes.items():
            stem = f"base_model.model.{module.format(expert, name)}"
            tensors |= {
                f"{stem}.lora_A.weight": torch.randn(2, inputs),
                f"{stem}.lora_B.weight": torch.randn(outputs, 2),
            }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    merged(tmp_path, {"a": "a"})
    single = load_file(tmp_path / "out/model.safetensors")
    merged(tmp_path, {"a": "a"}, base="fused")
    fused = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(3):
        rows = torch.cat([single[f"{module.format(expert, name)}.weight"] for name in ("gate", "up")])
        assert torch.equal(fused[expert], rows)
    assert not torch.equal(fused[0], model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"][0])
    assert torch.equal(fused[1], model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"][1])
