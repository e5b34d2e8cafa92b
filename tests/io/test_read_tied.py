"""Tied pairs that are stored twice, or under the other name: one tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from kit import noise
from weightsmith.io.read.open import open_source

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BODY = "model.layers.0.mlp.up_proj.weight"


def model(path: Path, seed: int, tied: bool = True, **more: torch.Tensor | None) -> Path:
    """Embedding and head, both stored and equal; `more` replaces tensors by 'embed' or 'head'."""
    path.mkdir()
    embed = noise(6, 4, seed=seed)
    tensors = {EMBED: more.get("embed", embed), HEAD: more.get("head", embed.clone()), BODY: noise(4, 4, seed=seed + 9)}
    save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_stored_twice_and_equal_is_one_tensor(tmp_path: Path) -> None:
    source = open_source(model(tmp_path / "m", 0))
    assert set(source.keys) == {EMBED, BODY}
    assert dict(source.aliases) == {HEAD: EMBED}
    for name, other in (("untied", {"tied": False}), ("apart", {"head": noise(6, 4, seed=5)})):
        assert set(open_source(model(tmp_path / name, 0, **other)).keys) == {EMBED, HEAD, BODY}  # type: ignore[arg-type]


def test_random_drops_are_the_same_at_both_ends(tmp_path: Path) -> None:
    base, a, b = (model(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b")))
    recipe = {
        "base": str(base),
        "models": {"a": str(a), "b": str(b)},
        "method": [{"dare": {"density": 0.5}}, "task_arithmetic"],
    }
    result = ws.Recipe.model_validate(recipe).run(tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    assert set(made) == {EMBED, BODY}
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert not any("tied" in str(warning) for warning in result.warnings)


def test_only_the_output_layer_is_stored(tmp_path: Path) -> None:
    """transformers takes it for the embedding."""
    lone = model(tmp_path / "lone", 0, embed=None)
    plain = model(tmp_path / "plain", 1, head=None)
    source = open_source(lone)
    assert set(source.keys) == {EMBED, BODY}
    assert torch.equal(source.read(EMBED), noise(6, 4, seed=0))
    ws.merge({"lone": lone, "plain": plain}, "average", out=tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(made[EMBED], (noise(6, 4, seed=0) + noise(6, 4, seed=1)) / 2)
    assert HEAD not in made


def test_the_only_output_layer_of_gpt2(tmp_path: Path) -> None:
    stored = {HEAD: noise(6, 4), "transformer.h.0.ln_1.weight": noise(4, seed=1)}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "tie_word_embeddings": True}))
    source = open_source(tmp_path)
    assert set(source.keys) == {"transformer.wte.weight", "transformer.h.0.ln_1.weight"}
    assert torch.equal(source.read("transformer.wte.weight"), stored[HEAD])


def test_an_encoder_decoder_has_one_embedding(tmp_path: Path) -> None:
    embed, head = noise(6, 4), noise(6, 4, seed=1)
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    save_file({"lm_head.weight": head, **{name: embed.clone() for name in names}}, tmp_path / "model.safetensors")
    config = {"model_type": "t5", "is_encoder_decoder": True, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    assert set(source.keys) == {"shared.weight", "lm_head.weight"}
    assert set(source.aliases.values()) == {"shared.weight"}
