"""Adapters on the tied heads of models for masked tokens, and of encoder-decoders: against the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from formats.test_tied_pairs import unsaid
from kit import texts
from lora.peft_models import TOKENS, adapter, loaded
from weightsmith.core.errors import WeightsmithError

TEXT = {"vocab_size": 48, "d_model": 16}
T5 = {**TEXT, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    **TEXT, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
BERT = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 48,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "BertForMaskedLM": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "BertLMHeadModel": ("BertConfig", {**BERT, "is_decoder": True}),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {
            **BART,
            "max_target_positions": 16,
            "max_source_positions": 16,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"vocab_size": 48, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 48},
    ),
}


def maker(name: str) -> Callable[[], torch.nn.Module]:
    import transformers

    config, sizes = MODELS[name]

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
        with torch.no_grad():  # biases of heads begin as zeros
            for key, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) if key.endswith("bias") else 0)
        return model

    return make


def logits(model: torch.nn.Module) -> Tensor:
    more = {"decoder_input_ids": TOKENS.flip(1)} if model.config.is_encoder_decoder else {}
    heard = model.config.model_type == "whisper"
    given = {"input_features": torch.linspace(-1, 1, 512).reshape(2, 8, 32)} if heard else {"input_ids": TOKENS}
    with torch.no_grad():
        return model(**given, **more).logits


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("T5ForConditionalGeneration", {"target_modules": ["q", "lm_head"]}),
        ("T5ForConditionalGeneration", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
        ("BartForConditionalGeneration", {"target_modules": ["lm_head"]}),
        ("BertForMaskedLM", {"target_modules": ["decoder"]}),
        ("BertForMaskedLM", {"target_modules": ["word_embeddings"]}),
        ("BertForMaskedLM", {"target_modules": ["position_embeddings"]}),
        ("BertForMaskedLM", {"target_modules": ["query", "decoder"], "bias": "all"}),
        ("BertForMaskedLM", {"target_modules": ["query"], "bias": "all"}),
        ("BertForMaskedLM", {"target_modules": ["query"], "modules_to_save": ["cls"]}),
        ("RobertaForMaskedLM", {"target_modules": ["lm_head.decoder"]}),
        ("DistilBertForMaskedLM", {"target_modules": ["vocab_projector"]}),
        ("BertLMHeadModel", {"target_modules": ["word_embeddings"]}),
        ("BertLMHeadModel", {"target_modules": ["decoder"]}),
        ("WhisperForConditionalGeneration", {"target_modules": ["proj_out"]}),
        ("WhisperForConditionalGeneration", {"target_modules": ["embed_tokens"]}),
        ("WhisperForConditionalGeneration", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
)
def test_an_adapter_on_a_tied_head(name: str, config: dict[str, Any], said: bool, tmp_path: Path) -> None:
    """The result gives what the running adapter gives, with every tensor that its class loads."""
    make = maker(name)
    make().save_pretrained(tmp_path / "base")
    if not said:
        unsaid(tmp_path / "base/config.json")
    path = adapter(tmp_path / "a", make, 1, **{"r": 2, "lora_alpha": 8, **config})
    ws.merge({"a": path}, "task_arithmetic", tmp_path / "base", out=tmp_path / "out")
    model, info = type(make()).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    want = logits(loaded(make, {"a": path}))
    assert (want - logits(make())).abs().max() > 0.01
    torch.testing.assert_close(logits(model.eval()), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_what_encoder_and_decoder_share_stays(name: str, tmp_path: Path) -> None:
    """Also where config.json leaves the tie to the default, as those of T5 and BART do."""
    make = maker(name)
    make().save_pretrained(tmp_path / "base")
    unsaid(tmp_path / "base/config.json")
    path = adapter(tmp_path / "a", make, 1, r=2, target_modules=["shared"])
    with pytest.raises(
        WeightsmithError, match=r"'(model\.)?shared.weight', which encoder, decoder and output layer of"
    ):
        ws.merge({"a": path}, "task_arithmetic", tmp_path / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", [True, False])
def test_a_decoder_inside_with_its_own_tie(said: bool, tmp_path: Path) -> None:
    """Of two models with a table each: adapters on the tables are refused, all others merged."""
    import json

    import transformers as tf

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        parts = (tf.BertConfig(**BERT), tf.BertConfig(**BERT))
        config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        return tf.EncoderDecoderModel(config=config).eval()

    make().save_pretrained(tmp_path / "base")
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    for part in ("encoder", "decoder") if not said else ():
        assert config[part].pop("tie_word_embeddings") is True
    path.write_text(json.dumps(config))
    tables = adapter(tmp_path / "a", make, 1, r=2, target_modules=["word_embeddings"])
    with pytest.raises(WeightsmithError, match=r"the output layer of .* is tied to cannot be told"):
        ws.merge({"a": tables}, "task_arithmetic", tmp_path / "base", out=tmp_path / "out")
    queries = adapter(tmp_path / "b", make, 1, r=2, target_modules=["query"])
    ws.merge({"b": queries}, "task_arithmetic", tmp_path / "base", out=tmp_path / "out")
    model, info = tf.EncoderDecoderModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model.eval()), logits(loaded(make, {"b": queries})), atol=1e-6, rtol=1e-5)


def test_a_head_of_its_own_beside_a_shared_embedding_is_said(tmp_path: Path) -> None:
    make = maker("T5ForConditionalGeneration")
    make().save_pretrained(tmp_path / "base")
    path = adapter(tmp_path / "a", make, 1, r=2, target_modules=["lm_head"])
    tree = {"base": str(tmp_path / "base"), "models": {"a": str(path)}, "method": "task_arithmetic"}
    result = ws.Recipe.model_validate(tree).run(tmp_path / "out")
    assert any("older releases tie the two" in text for text in texts(result.warnings))
    before, after = (tmp_path / name / "config.json" for name in ("base", "out"))
    assert before.read_text() == after.read_text()


def test_an_embedding_that_cannot_be_told_from_others(tmp_path: Path) -> None:
    """Two tables of one size, neither with a name of a known kind: which one is tied is not guessed."""
    import json

    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    tables = {f"model.{name}_embedding.weight": torch.randn(8, 4) for name in ("left", "right")}
    save_file({**tables, "model.layers.0.q_proj.weight": torch.randn(4, 4)}, base / "model.safetensors")
    config = {"architectures": ["OddForCausalLM"], "model_type": "odd", "tie_word_embeddings": True, "vocab_size": 8}
    (base / "config.json").write_text(json.dumps(config))
    own = tmp_path / "a"
    own.mkdir()
    prefix = "base_model.model.model.left_embedding"
    save_file(
        {f"{prefix}.lora_embedding_A": torch.randn(2, 8), f"{prefix}.lora_embedding_B": torch.randn(4, 2)},
        own / "adapter_model.safetensors",
    )
    (own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(WeightsmithError, match="cannot be told"):
        ws.merge({"a": own}, "task_arithmetic", base, out=tmp_path / "out")
