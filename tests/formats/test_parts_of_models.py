"""Models of several parts, each merged in its own way by rules over names; and folders of Sentence-Transformers."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws

TEXT = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
}


def llava(seed: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=63)
    return LlavaForConditionalGeneration(config).eval()


def whisper(seed: int) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    config = WhisperConfig(
        **{"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "num_mel_bins": 8},
        **{"max_source_positions": 20, "max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    )
    return WhisperForConditionalGeneration(config).eval()


def merged(make: Any, rules: list[dict[str, Any]], folder: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """base, one and two saved and merged (mean by default); the three as they lie on disk."""
    for seed, name in enumerate(("base", "one", "two")):
        make(seed).save_pretrained(folder / name)
    tree = {
        "base": str(folder / "base"),
        "models": {name: str(folder / name) for name in ("one", "two")},
        "method": "linear",
        "rules": rules,
    }
    out = ws.Recipe.model_validate(tree).run(folder / "out").out
    return out, {name: load_file(folder / name / "model.safetensors") for name in ("base", "one", "two")}


def test_a_model_that_sees_by_module(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    rules = [
        {"match": ["*vision_tower*"], "method": "keep"},
        {"match": ["*projector*"], "method": {"task_arithmetic": {"lambda": 0.3}}},
    ]
    out, states = merged(llava, rules, tmp_path)
    got, base = load_file(out / "model.safetensors"), states["base"]
    seen = dict.fromkeys(("vision", "projector", "language"), 0)
    for name, value in got.items():
        one, two = states["one"][name], states["two"][name]
        if fnmatch(name, "*vision_tower*"):
            assert torch.equal(value, base[name])
            seen["vision"] += 1
        elif fnmatch(name, "*projector*"):
            torch.testing.assert_close(value, base[name] + 0.3 * ((one - base[name]) + (two - base[name])))
            seen["projector"] += 1
        else:
            torch.testing.assert_close(value, (one + two) / 2)
            seen["language"] += 1
    assert all(seen.values())
    model = LlavaForConditionalGeneration.from_pretrained(out).eval()
    ids = torch.tensor([[1, 63, 63, 63, 63, 5]])
    with torch.inference_mode():
        assert model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8)).logits.shape == (1, 6, 64)


def test_a_model_that_hears_by_module(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    out, states = merged(whisper, [{"match": ["*.encoder.*"], "method": {"ties": {"density": 0.5}}}], tmp_path)
    got = load_file(out / "model.safetensors")
    encoder = {n: {k: v for k, v in s.items() if ".encoder." in k} for n, s in states.items()}
    alone = ws.merge({"one": encoder["one"], "two": encoder["two"]}, "ties", base=encoder["base"], density=0.5)
    assert alone
    for name, value in got.items():
        want = alone[name] if name in alone else (states["one"][name] + states["two"][name]) / 2
        torch.testing.assert_close(value, want)
    model = WhisperForConditionalGeneration.from_pretrained(out).eval()
    with torch.inference_mode():
        said = model.generate(torch.randn(1, 8, 40), max_new_tokens=3, min_new_tokens=3)
    assert said.shape[1] >= 3


def qwen_vl(seed: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "image_token_id": 63, "video_token_id": 62}
    text = {**TEXT, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=60, vision_end_token_id=61, **ids
    )
    return Qwen2VLForConditionalGeneration(config).eval()


CASES = {
    "vision": (
        qwen_vl,
        {"sight": ("*visual.blocks.*", "keep"), "joint": ("*visual.merger.*", "slerp"), "rest": ("*", "ties")},
    ),
    "speech": (
        whisper,
        {"ears": ("*.encoder.*", "ties"), "mouth": ("*.decoder.layers.*", "slerp"), "rest": ("*", "keep")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_modules_with_a_method_each(case: str, tmp_path: Path) -> None:
    """A model joined of three recipes: every tensor is what its recipe alone makes of it, and transformers loads it."""
    make, parts = CASES[case]
    for seed, name in enumerate(("base", "one")):
        make(seed).save_pretrained(tmp_path / name)
    own = {"keep": {}, "slerp": {"t": 0.3}, "ties": {"density": 0.5}}
    modules = {
        name: {"match": [globs], "model": {
            "base": str(tmp_path / "base"), "models": {"one": str(tmp_path / "one")}, "method": method,
            "parameters": own[method],
        }}
        for name, (globs, method) in parts.items()
    }  # fmt: skip
    tree = {"models": {"joined": {"modules": modules}}, "method": "passthrough"}
    out = ws.Recipe.model_validate(tree).run(tmp_path / "out").out
    got, base, one = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base", "one"))
    assert got.keys() == base.keys()
    names: dict[str, list[str]] = {part: [] for part in parts}
    for name in got:
        names[next(part for part, (globs, _) in parts.items() if fnmatch(name, globs))].append(name)
    for part, (_, method) in parts.items():
        before = [{name: model[name] for name in names[part]} for model in (base, one)]
        alone = ws.merge({"one": before[1]}, method, base=before[0], **own[method])
        assert alone
        assert all(torch.equal(got[name], value) for name, value in alone.items())
        assert all(torch.equal(got[name], base[name]) for name in alone) == (method == "keep")
    model, info = make(2).__class__.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.inference_mode():
        if case == "speech":
            assert model.generate(torch.randn(1, 8, 40), max_new_tokens=3, min_new_tokens=3).shape[1] >= 3
        else:
            ids = torch.tensor([[60, *[63] * 4, 61, 5]])
            seen_by = {"pixel_values": torch.randn(16, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}
            kinds = {"mm_token_type_ids": (ids == 63).int()}
            assert model(input_ids=ids, **seen_by, **kinds).logits.shape == (1, 7, 64)


def test_mergekits_modules_of_models_that_see_and_hear(tmp_path: Path) -> None:
    for kind, make in (("see", qwen_vl), ("hear", whisper)):
        for seed in range(2):
            make(seed).save_pretrained(tmp_path / f"{kind}{seed}")

    def run(kind: str, shares: dict[str, tuple[float, float]]) -> tuple[dict[str, torch.Tensor], ...]:
        listed = "".join(
            f"  {part}: {{models: [{{model: {kind}0, parameters: {{weight: {a}}}}}, "
            f"{{model: {kind}1, parameters: {{weight: {b}}}}}]}}\n"
            for part, (a, b) in shares.items()
        )
        path = tmp_path / f"{kind}.yml"
        path.write_text(f"modules:\n{listed}merge_method: linear\n")
        ws.Recipe.load(path).run(tmp_path / f"{kind}-out")
        return tuple(load_file(tmp_path / f"{kind}{end}" / "model.safetensors") for end in ("0", "1", "-out"))

    shares = {"text_decoder": (0.7, 0.3), "multi_modal_projector": (0.5, 0.5), "vision_tower": (1.0, 0.0)}
    one, two, got = run("see", shares)
    for name, value in got.items():
        part = "vision_tower" if "visual.blocks" in name or "patch_embed" in name else "text_decoder"
        a, b = shares["multi_modal_projector" if "visual.merger" in name else part]
        torch.testing.assert_close(value, a * one[name] + b * two[name])
    one, two, got = run("hear", {"encoder": (0.8, 0.2), "decoder": (0.3, 0.7)})
    for name, value in got.items():
        a, b = (0.8, 0.2) if ".encoder." in name else (0.3, 0.7)
        torch.testing.assert_close(value, a * one[name] + b * two[name])


def sentence_folder(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A folder as Sentence-Transformers saves it: a BERT at the top, pooling, and a dense layer with weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Dense", "Dense")]
    listed = [{"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
              for i, path, kind in modules]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine"}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}')
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense/config.json").write_text('{"in_features": 16, "out_features": 8, "bias": true}')
    dense = {"linear.weight": torch.randn(8, 16), "linear.bias": torch.randn(8)}
    save_file(dense, folder / "2_Dense/model.safetensors")
    return dense


def test_a_folder_of_sentence_transformers_stays_one(tmp_path: Path) -> None:
    """Read back as that library does: modules.json names the folders, each holds its config and weights."""
    from transformers import AutoModel

    sentence_folder(tmp_path / "base", 0)
    dense = [sentence_folder(tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)]
    models = {name: str(tmp_path / name) for name in ("one", "two")}
    tree = {"base": str(tmp_path / "base"), "models": models, "method": "linear"}
    out = ws.Recipe.model_validate(tree).run(tmp_path / "out").out
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense"]
    for module in modules:
        assert json.loads((out / module["path"] / "config.json").read_text())
    assert (out / "sentence_bert_config.json").exists()
    bert, info = AutoModel.from_pretrained(out / modules[0]["path"], output_loading_info=True)
    assert not any(info.values()), info
    parts = [AutoModel.from_pretrained(tmp_path / name) for name in models]
    for name, value in bert.state_dict().items():
        torch.testing.assert_close(value, sum(part.state_dict()[name] for part in parts) / 2)
    kept = load_file(out / modules[2]["path"] / "model.safetensors")
    for name, value in kept.items():
        torch.testing.assert_close(value, (dense[0][name] + dense[1][name]) / 2)
    with torch.inference_mode():
        hidden = bert.eval()(torch.tensor([[1, 2, 3]])).last_hidden_state.mean(1)
        embedding = torch.tanh(hidden @ kept["linear.weight"].T + kept["linear.bias"])
    assert embedding.shape == (1, 8)
