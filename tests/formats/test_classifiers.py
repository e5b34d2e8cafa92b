"""Classifiers, as adapters and as full models, on a base that has no such head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from formats.test_adapters import llama, logits, merged, tf, trained
from kit import texts
from weightsmith.core.errors import PlanError

SCORE = "score.weight"
CLASS = tf.AutoModelForSequenceClassification


def classifier(folder: Path, seed: int, labels: int = 3, **config: Any) -> dict[str, torch.Tensor]:
    """Save a classifier that was tuned in full, on the base beside it."""
    model = CLASS.from_pretrained(folder.parent / "base", num_labels=labels, pad_token_id=0, **config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def adapter(folder: Path, seed: int, labels: int = 3) -> torch.Tensor:
    model = CLASS.from_pretrained(folder.parent / "base", num_labels=labels, pad_token_id=0)
    trained(folder, model, seed, task_type="SEQ_CLS")
    return load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", ["dare", "task_arithmetic"]])
def test_two_trained_heads_become_their_mean(method: Any, tmp_path: Path) -> None:
    """Whatever the method: there is no base that they could have changed from."""
    llama(tmp_path / "base")
    heads = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    llama(tmp_path / "plain")
    for models in ({"a": "a", "b": "b"}, {"p": "plain", "a": "a", "b": "b"}):
        result = merged(tmp_path, models, method=method)
        after = load_file(tmp_path / "out/model.safetensors")
        torch.testing.assert_close(after[SCORE], (heads[0] + heads[1]) / 2)
        assert "lm_head.weight" not in after
        assert any(
            "lacks score.weight, which a and b have: the result has their mean" in t for t in texts(result.warnings)
        )
    logits(CLASS, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_tuned_in_full(tied: bool, tmp_path: Path) -> None:
    llama(tmp_path / "base", tie_word_embeddings=tied)
    names = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
    tuned = classifier(tmp_path / "c", 1, **names)
    result = merged(tmp_path, {"c": "c"})
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == tuned.keys()
    for name, tensor in tuned.items():
        torch.testing.assert_close(after[name], tensor)
    assert any("lacks score.weight, which c has: the result is a classifier" in text for text in texts(result.warnings))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    assert config["pad_token_id"] == 0
    logits(CLASS, tmp_path / "out")


@pytest.mark.parametrize("pooled", [False, True])
def test_what_a_class_begins_at_random_is_said(pooled: bool, tmp_path: Path) -> None:
    """BERT's classifier has a pooler, which peft does not save and a base for masked tokens lacks."""
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    (tf.BertModel if pooled else tf.BertForMaskedLM)(config).save_pretrained(tmp_path / "base")
    model = CLASS.from_pretrained(tmp_path / "base", num_labels=3)
    trained(tmp_path / "a", model, task_type="SEQ_CLS", target_modules=["query"])
    said = [text for text in texts(merged(tmp_path, {"a": "a"}).warnings) if "begins them at random" in text]
    assert [("bert.pooler.dense.weight" in text) for text in said] == ([] if pooled else [True])


def test_heads_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    llama(tmp_path / "base")
    adapter(tmp_path / "three", 1, 3)
    adapter(tmp_path / "two", 2, 2)
    with pytest.raises(PlanError) as caught:
        merged(tmp_path, {"three": "three", "two": "two"})
    assert str(caught.value) == "unlike heads: score.weight has 3 labels in three but 2 in two; leave one out"
    for name, labels in (("up", ["no", "yes"]), ("down", ["yes", "no"])):
        classifier(
            tmp_path / name, 1, 2, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
        )
    with pytest.raises(PlanError, match=r"the labels are \['no', 'yes'\] in up but \['yes', 'no'\] in down"):
        merged(tmp_path, {"up": "up", "down": "down"})
    result = merged(tmp_path, {"up": "up", "down": "down"}, base="", method="linear")
    assert any('id2label is ["no", "yes"] in up, ["yes", "no"] in down' in text for text in texts(result.warnings))


@pytest.mark.parametrize(
    ("base", "tuned", "prefix"),
    [
        (tf.BertModel, tf.BertForTokenClassification, "bert."),
        (tf.BertModel, tf.BertForQuestionAnswering, "bert."),
        (tf.ViTModel, tf.ViTForImageClassification, "vit."),
    ],
)
def test_classes_without_the_pooling_layer_of_their_base(base: Any, tuned: Any, prefix: str, tmp_path: Path) -> None:
    """transformers builds most classes with a head without the pooler that an encoder by itself has."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    more: dict[str, Any] = {"image_size": 8, "patch_size": 4} if base is tf.ViTModel else {"vocab_size": 12}
    config = base.config_class(**sizes, **more)
    torch.manual_seed(0)
    encoder = base(config)
    encoder.save_pretrained(tmp_path / "base")
    for name in "ab":
        model = tuned(config)
        getattr(model, prefix[:-1]).load_state_dict(encoder.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
    before = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "a", "b")]
    result = merged(tmp_path, {"a": "a", "b": "b"}, parameters={"lambda": 0.5})
    after = load_file(tmp_path / "out/model.safetensors")
    assert {prefix + name for name in before[0]} - {prefix + n for n in after} == {
        f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias",
    }  # fmt: skip
    for name, tensor in after.items():
        own = name if name in before[1] else prefix + name
        torch.testing.assert_close(tensor, (before[1][own] + before[2][own]) / 2)
    assert any(
        text.endswith("which a and b have: the result has their mean, whatever the method, and no pooler.dense.bias, "
                      "pooler.dense.weight") for text in texts(result.warnings)
    )  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [tuned.__name__]
