"""Heads that some models tie and others do not, and the bias that BART adds to its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from kit import texts
from tokens.test_one_vocabulary import tokenizer_at
from weightsmith.core.errors import PlanError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ["<s>", "</s>", "<unk>", "red", "blue"]


def llama(folder: Path, seed: int, tied: bool) -> dict[str, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def run(folder: Path, tree: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A recipe with names for folders -> its result and tensors."""
    models = {name: str(folder / name) for name in tree.pop("models")}
    base = {"base": str(folder / tree.pop("base"))} if "base" in tree else {}
    result = ws.Recipe.model_validate({**base, "models": models, **tree}).run(folder / "out")
    return result, load_file(folder / "out/model.safetensors")


@pytest.mark.parametrize(("first", "second"), [("tied", "free"), ("free", "tied")])
def test_a_tied_head_is_untied_where_another_model_has_its_own(first: str, second: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = {name: llama(tmp_path / name, seed, name == "tied") for seed, name in enumerate(("tied", "free"))}
    assert HEAD not in before["tied"]
    heads = {name: model.get(HEAD, model[EMBED]) for name, model in before.items()}
    tree = {"base": first, "models": [second], "method": "task_arithmetic", "parameters": {"lambda": 0.25}}
    result, after = run(tmp_path, tree)
    torch.testing.assert_close(after[HEAD], heads[first] + 0.25 * (heads[second] - heads[first]))
    torch.testing.assert_close(
        after[EMBED], before[first][EMBED] + 0.25 * (before[second][EMBED] - before[first][EMBED])
    )
    assert any(f"tied to {EMBED}, {HEAD} becomes a tensor of its own" in text for text in texts(result.warnings))
    folders = {name: tmp_path / name for name in (first, second)}
    in_memory = ws.merge({second: folders[second]}, "task_arithmetic", folders[first], lambda_=0.25)
    assert in_memory.keys() == after.keys()
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in after.items()), "one path"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.weight, after[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, after[EMBED])


def test_models_that_all_tie_stay_tied(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        llama(tmp_path / name, seed, True)
    _, after = run(tmp_path, {"models": ["one", "two"], "method": "linear"})
    assert HEAD not in after
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_other_heads_are_no_output_layers(tmp_path: Path) -> None:
    """A reward model's head has a row or two: nothing is tied to it, and it may be carried over."""
    llama(tmp_path / "plain", 0, True)
    tensors = llama(tmp_path / "reward", 1, True)
    save_file({**tensors, "score.weight": torch.ones(1, 16)}, tmp_path / "reward/model.safetensors")
    tree = {"models": ["plain", "reward"], "method": "linear"}
    with pytest.raises(PlanError, match=r"another kind of model than plain, with another head \(score.weight\)"):
        run(tmp_path, dict(tree))
    _, after = run(tmp_path, {**tree, "exclude": ["score.weight"]})
    assert torch.equal(after["score.weight"], torch.ones(1, 16))
    assert HEAD not in after


def test_t5_scales_what_goes_into_a_tied_head_so_it_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    for name in ("tied", "free"):
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / name)
    # As T5 1.1 is published; transformers 5 no longer writes such a folder itself.
    file, config = tmp_path / "free/model.safetensors", tmp_path / "free/config.json"
    save_file({**load_file(file), HEAD: torch.randn(32, 16)}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    text = r"lm_head.weight is a tensor of its own in free, but tied has none, or uses its embedding in another way"
    with pytest.raises(PlanError, match=text):
        run(tmp_path, {"models": ["tied", "free"], "method": "linear"})
    with pytest.raises(PlanError, match=r"lm_head.weight is missing in tied .* it may be tied to the embedding there"):
        run(tmp_path, {"models": ["free", "tied"], "method": "linear"})


def bart(folder: Path, seed: int, words: list[str]) -> dict[str, torch.Tensor]:
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer_at(folder, words)
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, pad_token_id=2,
        bos_token_id=0, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
    ))  # fmt: skip
    model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_barts_bias_of_logits_is_merged_like_the_rest(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    one, two = (bart(tmp_path / name, seed, WORDS) for seed, name in enumerate(("one", "two")))
    _, after = run(tmp_path, {"models": ["one", "two"], "method": "linear"})
    torch.testing.assert_close(after["final_logits_bias"], (one["final_logits_bias"] + two["final_logits_bias"]) / 2)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model.final_logits_bias, after["final_logits_bias"])


def test_barts_of_unlike_vocabularies_are_one_sentence(tmp_path: Path) -> None:
    """Nothing is advised that would be refused next; what is advised works."""
    own = bart(tmp_path / "one", 0, WORDS)
    bart(tmp_path / "two", 1, [*WORDS, "green"])
    tree = {"models": ["one", "two"], "method": "linear"}
    with pytest.raises(PlanError) as told:
        run(tmp_path, dict(tree))
    text = str(told.value)
    assert text.startswith("unlike vocabularies: model.shared.weight has 5 rows in one and 6 in two")
    assert "\n" not in text
    assert "union" not in text
    listed = json.loads(text[text.index("[") : text.index("]") + 1])
    assert sorted(listed) == ["final_logits_bias", "model.shared.weight"]
    with pytest.raises(PlanError) as told:
        run(tmp_path, {**tree, "tokenizer": "union"})
    assert "final_logits_bias has its tokens along the second axis; give it no other vocabulary" in str(told.value)
    assert "\n" not in str(told.value)
    _, after = run(tmp_path, {**tree, "exclude": listed})
    assert all(torch.equal(after[name], own[name]) for name in listed)
