"""Adapters out of encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft_models import quiet
from transformers import BertConfig, BertModel

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
