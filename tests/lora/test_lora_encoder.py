"""Adapters out of encoders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from peft_models import quiet
from transformers import BertConfig, BertForMaskedLM, BertModel, DistilBertConfig, DistilBertForMaskedLM

import weightsmith as ws
from weightsmith import lora


def test_all_embeddings_of_an_encoder_become_factors(tmp_path: Path) -> None:
    """Those of positions and types too; in full only where that is asked for."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertModel(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=20)).eval()
    tuned = BertModel(base.config).eval()
    tuned.load_state_dict(
        {n: t + 0.1 * torch.randn_like(t) if t.ndim == 2 else t for n, t in base.state_dict().items()}
    )
    with quiet():
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
    result = lora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert result.saved == ()
    assert {f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")} < {
        m.name for m in result.modules
    }
    words = {"input_ids": torch.arange(12).reshape(2, 6), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}
    with torch.no_grad(), quiet():
        got = PeftModel.from_pretrained(base, result.out).eval()(**words).last_hidden_state
        torch.testing.assert_close(got, tuned(**words).last_hidden_state, rtol=1e-4, atol=1e-4)
    whole = lora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "whole", whole_embeddings=True)
    assert len(whole.saved) == 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_an_output_layer_changes_with_the_embedding_that_it_shares(kind: str, whole: bool, tmp_path: Path) -> None:
    """Its bias too; as many positions as tokens confuse nobody."""
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        base = BertForMaskedLM(BertConfig(vocab_size=48, max_position_embeddings=48, **sizes)).eval()
    else:
        sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
        base = DistilBertForMaskedLM(DistilBertConfig(vocab_size=48, max_position_embeddings=48, **sizes)).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad(), quiet():
        for name, tensor in tuned.named_parameters():
            if tensor.ndim == 2 or name.endswith(("predictions.bias", "vocab_projector.bias")):
                tensor += 0.1 * torch.randn_like(tensor)
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
    result = lora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", whole_embeddings=whole)
    assert result.tried.startswith("tried: peft "), result.warnings
    words = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.no_grad(), quiet():
        want = tuned(**words).logits
        assert float((want - base(**words).logits).abs().max()) > 0.1
        torch.testing.assert_close(
            PeftModel.from_pretrained(copy.deepcopy(base), result.out).eval()(**words).logits,
            want,
            rtol=1e-4,
            atol=1e-4,
        )
        ws.merge({"a": result.out}, "task_arithmetic", tmp_path / "base", out=tmp_path / "back")
        back = type(base).from_pretrained(tmp_path / "back").eval()
        torch.testing.assert_close(back(**words).logits, want, rtol=1e-4, atol=1e-4)


SIZES = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
CLASSIFIERS: dict[str, tuple[Any, Any, str, bool]] = {
    "a body below the same head": (
        tf.RobertaForSequenceClassification, tf.RobertaForSequenceClassification, "SEQ_CLS", False
    ),
    "a head of two layers": (tf.RobertaForSequenceClassification, tf.RobertaForSequenceClassification, "SEQ_CLS", True),
    "a new head on a language model": (tf.LlamaForCausalLM, tf.LlamaForSequenceClassification, "SEQ_CLS", True),
    "a new head on a bare model": (tf.BertModel, tf.BertForTokenClassification, "TOKEN_CLS", True),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifiers_come_back_with_their_heads(case: str, tmp_path: Path) -> None:
    """peft keeps the head in full by itself, and wants all of it in the file, changed or not."""
    before, after, task, moved = CLASSIFIERS[case]
    torch.manual_seed(0)
    with quiet():
        before(before.config_class(**SIZES)).save_pretrained(tmp_path / "base")
        fresh = after.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True).eval()
        tuned = copy.deepcopy(fresh)
        with torch.no_grad():
            for name, tensor in tuned.named_parameters():
                if tensor.ndim == 2 and "embed" not in name and (moved or "classifier" not in name):
                    tensor += 0.2 * torch.randn_like(tensor)
        tuned.save_pretrained(tmp_path / "tuned")
        if before is after:
            fresh.save_pretrained(tmp_path / "base")
    result = lora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert result.tried.startswith("tried: peft "), result.warnings
    assert json.loads((result.out / "adapter_config.json").read_text())["task_type"] == task
    words = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.no_grad(), quiet():
        got = PeftModel.from_pretrained(fresh, result.out).eval().base_model.model(**words).logits
        torch.testing.assert_close(got, tuned(**words).logits, rtol=1e-4, atol=1e-4)
