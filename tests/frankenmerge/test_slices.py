"""Slices and modules as sources: names, configs, what has no place, and checkpoints that are one file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, RecipeError, SourceError
from weightsmith.io.read.layers import Stacked, adopt_config, cut_config, stack_configs
from weightsmith.io.read.source import MemorySource
from weightsmith.io.read.stack import join_modules, stack_slices
from weightsmith.io.read.views import SliceSource
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import loads
from weightsmith.recipe.text import dumps

TIED = torch.full((3, 2), 7.0)


def unknown(seed: int, blocks: int = 4) -> dict[str, torch.Tensor]:
    """A model of no known architecture: numbered parts, a first block with a tensor of its own, a tied head."""
    found = {"token_table": TIED * seed, "out.tokens": TIED * seed}
    for i in range(blocks):
        found[f"trunk.part.{i}.mix.0.w"] = torch.full((2, 2), seed * 100.0 + i)
        found[f"trunk.part.{i}.experts.1.w"] = torch.full((2,), seed * 1000.0 + i)
    found["trunk.part.0.offsets"] = torch.full((5,), float(seed))
    return found | {"closing_norm": torch.full((2,), float(seed))}


def tied(seed: int) -> MemorySource:
    tensors = unknown(seed)
    return MemorySource(tensors | {"out.tokens": tensors["token_table"]}, f"m{seed}")


def test_an_unknown_architecture_is_stacked_by_its_names() -> None:
    joined = stack_slices([SliceSource(tied(1), 0, 2), SliceSource(tied(2), 1, 4), SliceSource(tied(1), 3, 4)])
    assert [joined.read(f"trunk.part.{i}.mix.0.w")[0, 0].item() for i in range(6)] == [100, 101, 201, 202, 203, 103]
    assert joined.read("trunk.part.5.experts.1.w")[0] == 1003
    assert [n for n in joined.keys if n.endswith("offsets")] == ["trunk.part.0.offsets"]
    assert joined.read("trunk.part.0.offsets")[0] == 1
    assert joined.read("closing_norm")[0] == 1
    assert joined.aliases == {"out.tokens": "token_table"}
    again = pickle.loads(pickle.dumps(joined))
    assert again.read("trunk.part.2.mix.0.w", 1)[0, 0] == 201
    assert list(again.keys) == list(joined.keys)


def test_a_slice_that_starts_later_keeps_what_only_the_first_block_has() -> None:
    cut = SliceSource(tied(3), 2, 4)
    assert cut.read("trunk.part.0.offsets")[0] == 3
    assert cut.read("trunk.part.0.mix.0.w")[0, 0] == 302


def test_slices_of_unlike_stacks_are_refused() -> None:
    two = MemorySource(
        {f"{s}.{i}.w": torch.ones(1) for s in ("encoder.block", "decoder.block") for i in range(3)}, "two"
    )
    with pytest.raises(SourceError, match=r"slices of unlike stacks of blocks .*say which is meant, as stack: "):
        stack_slices([SliceSource(two, 0, 2, "encoder.block"), SliceSource(two, 1, 3, "decoder.block")])
    only = stack_slices([SliceSource(two, 0, 2, "decoder.block"), SliceSource(two, 1, 3, "decoder.block")])
    assert sorted(only.keys) == [
        f"{s}.{i}.w" for s, n in (("decoder.block", 4), ("encoder.block", 3)) for i in range(n)
    ]
    with pytest.raises(SourceError, match=r"cannot take blocks \[0, 4\) of decoder\.block: encoder\.block has 3"):
        SliceSource(two, 0, 4, "decoder.block")


def test_modules_side_by_side() -> None:
    a, b = MemorySource({"x.w": torch.ones(1)}, "a"), MemorySource({"y.w": torch.zeros(1)}, "b")
    joined = join_modules({"x": a, "y": b})
    assert joined.read("x.w").item() == 1
    assert joined.read("y.w").item() == 0
    assert joined.origin.label == "{x: a, y: b}"


# --- config.json -------------------------------------------------------------------------------------


def cut(config: dict[str, Any], start: int, end: int, stack: str = "model.layers", count: int = 6) -> dict[str, Any]:
    return dict(json.loads(cut_config(json.dumps(config), {stack: (count, start, end)}, "here")))


def stacked(config: dict[str, Any], *ranges: tuple[int, int], stack: str = "model.layers") -> dict[str, Any]:
    parts = [Stacked(json.dumps(cut(config, *r, stack)), {stack: r[1] - r[0]}) for r in ranges]
    return dict(json.loads(stack_configs(parts, "here")))


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 6, "layer_types": list("abcdef")},
         {"num_hidden_layers": 7, "layer_types": list("abcdbcf")}),
        ({"n_layer": 6, "eos_token_id": [1, 2, 3, 4, 5, 6]}, {"n_layer": 7, "eos_token_id": [1, 2, 3, 4, 5, 6]}),
        ({"num_hidden_layers": 6, "model_type": "gemma2", "sliding_window": 8}, {"layer_types": [S, F, S, F, F, S, F]}),
        ({"num_layers": 6, "sliding_window_pattern": 3}, {"layer_types": [S, S, F, S, S, F, F]}),
        ({"num_layers": 6, "sliding_window_pattern": "LLG"}, {"layer_types": [S, S, F, S, S, F, F]}),
        ({"num_layers": 6, "full_attention_interval": 6},
         {"layer_types": ["linear_attention"] * 6 + [F]}),
        ({"num_layers": 6, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
         {"layer_types": [F, F, S, S, F, S, S], "max_window_layers": 2}),
        ({"num_layers": 6, "use_sliding_window": False, "max_window_layers": 2}, {"max_window_layers": 2}),
        ({"num_layers": 6, "no_rope_layer_interval": 2}, {"no_rope_layers": [1, 0, 1, 0, 0, 1, 0]}),
        ({"num_layers": 6, "mlp_only_layers": [1, 5]}, {"mlp_only_layers": [1, 4, 6]}),
        ({"num_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": []},
         {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2, 5]}),
        ({"num_layers": 6, "first_k_dense_replace": 1}, {"first_k_dense_replace": 1}),
        ({"text_config": {"num_hidden_layers": 6}, "vision_config": {"num_hidden_layers": 6}},
         {"text_config": {"num_hidden_layers": 7}, "vision_config": {"num_hidden_layers": 6}}),
    ],
)  # fmt: skip
def test_the_config_follows_the_layers(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = stacked(config, (0, 4), (1, 3), (5, 6))
    assert {k: found[k] for k in expected} == expected
    assert set(config) <= set(found)


def test_encoder_and_decoder_have_counts_of_their_own() -> None:
    whisper = {"encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6}
    assert cut(whisper, 0, 2, "model.decoder.layers") == whisper | {"decoder_layers": 2}
    assert cut(whisper, 0, 2, "model.encoder.layers") == {**whisper, "encoder_layers": 2, "num_hidden_layers": 2}
    t5 = {"num_layers": 6, "num_decoder_layers": 6}
    assert cut(t5, 1, 4, "decoder.block") == {"num_layers": 6, "num_decoder_layers": 3}
    vision = {"num_hidden_layers": 6, "vision_config": {"depth": 6}}
    assert cut(vision, 1, 4, "visual.blocks") == {"num_hidden_layers": 6, "vision_config": {"depth": 3}}
    assert cut(vision, 1, 4) == {"num_hidden_layers": 3, "vision_config": {"depth": 6}}


def test_what_a_config_cannot_say_is_refused() -> None:
    with pytest.raises(SourceError, match=r"dense layers follow layers with experts; take the dense ones"):
        stacked({"num_layers": 6, "first_k_dense_replace": 2}, (0, 4), (1, 3))
    jamba = {"num_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1}
    assert stacked(jamba, (0, 3), (3, 6))["attn_layer_offset"] == 1
    assert cut(jamba, 2, 6)["attn_layer_offset"] == 2
    with pytest.raises(SourceError, match="attn_layer_period are after this; take slices whose"):
        stacked(jamba, (0, 2), (0, 4))


def test_a_module_brings_the_layers_of_its_stacks() -> None:
    frame = {"text_config": {"num_hidden_layers": 6, "layer_types": [F] * 6}, "vision_config": {"depth": 2}}
    part = Stacked(json.dumps({"text_config": {"num_hidden_layers": 2, "layer_types": [S, F]}}), {"language.layers": 2})
    assert json.loads(adopt_config(json.dumps(frame), part, "here")) == {
        "text_config": {"num_hidden_layers": 2, "layer_types": [S, F]},
        "vision_config": {"depth": 2},
    }


# --- native recipes ----------------------------------------------------------------------------------


def store(folder: Path, seed: int, blocks: int = 4) -> Path:
    folder.mkdir()
    save_file(unknown(seed, blocks), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "new", "n_layers": blocks, "dtype": "float32"}))
    return folder


def test_slices_of_merges_and_of_models(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b"), 1):
        store(tmp_path / name, seed)
    text = """
models:
  tall:
    slices:
      - {model: a, layers: [0, 2]}
      - models: {a: {model: a, layers: [1, 4]}, b: {model: b, layers: [1, 4]}}
        method: linear
      - {model: {slices: [{model: b, layers: [3, 4]}, {model: a, layers: [0, 1]}]}, layers: [1, 2]}
method: passthrough
parameters: {scale: [{layers: [0, 1], value: 2}, {match: "*experts*", value: 1}, {layers: outside, value: 3}, 1]}
output: {dtype: bfloat16}
"""
    recipe = loads(text, "r.yaml", folder=tmp_path)
    assert loads(dumps(recipe), "r.yaml") == recipe
    run(recipe, tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    assert [out[f"trunk.part.{i}.mix.0.w"][0, 0].item() for i in range(6)] == [200, 101, 151, 152, 153, 100]
    assert [out[f"trunk.part.{i}.experts.1.w"][0].item() for i in range(2)] == [2000, 1000]  # 1001 in bfloat16
    assert out["closing_norm"][0] == 3
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"model_type": "new", "n_layers": 6, "dtype": "bfloat16"}
    assert main(["plan", str(write_recipe(tmp_path, text))]) == 0


def write_recipe(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{slices: []}", r"r\.yaml:1:\d+: models\.m\.slices should be a list of models, each with a dash"),
        (
            "{slices: [{model: a, layer: [0, 1]}]}",
            r"unknown key 'layer' in models\.m\.slices\[0\]; did you mean 'layers'\?",
        ),
        ("{slices: [{model: a, layers: [1, 1]}]}", r"models\.m\.slices\[0\]\.layers should be two block numbers"),
        ("{slices: [a], weight: 1}", r"unknown key 'weight' in models\.m; known: slices"),
        ("{modules: {x: a}}", r"models\.m\.modules\.x should be a mapping with match and model"),
        ("{modules: {x: {model: a, mach: z}}}", r"unknown key 'mach' in models\.m\.modules\.x; did you mean 'match'\?"),
        ("{modules: []}", r"models\.m\.modules is empty; name at least one"),
    ],
)
def test_slices_and_modules_are_checked(model: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loads(f"models: {{m: {model}}}\nmethod: passthrough", "r.yaml")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("[{match: x}]", r"parameters\.weight\[0\] has no 'value'; write value: 0\.5"),
        ("[{mach: x, value: 1}]", r"unknown key 'mach' in parameters\.weight\[0\]; did you mean 'match'\?"),
        ("[1, {match: x, value: 1}]", r"parameters\.weight\[0\] is for every tensor.*put it last"),
        ("[{role: quu, value: 1}]", r"unknown role 'quu'"),
        (
            "[{layers: inside, value: 1}]",
            r"layers should be two block numbers .*, is 'inside'; 'outside' means the tensors outside",
        ),
        ("[{match: 3, value: 1}]", r"match should be a word or a list of words, is 3"),
        ("[{match: x, value: high}]", r"linear: weight = 'high' is no number"),
    ],
)
def test_cases_are_checked(weight: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loads(f"models: {{a: x, b: y}}\nmethod: linear\nparameters: {{weight: {weight}}}", "r.yaml")


def test_cases_fall_through_to_the_next_place(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b"), 1):
        store(tmp_path / name, seed)
    text = """
models:
  a: {model: a, weight: [{match: "*mix*", value: 5}]}
  b: {model: b, weight: [{role: norm, value: null}, 0]}
method: linear
parameters: {weight: [{layers: [1, 4], value: 2}], normalize: false}
exclude: [closing_norm]
"""
    run(loads(text, "r.yaml", folder=tmp_path), tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    assert out["trunk.part.1.mix.0.w"][0, 0] == 5 * 101
    assert out["trunk.part.1.experts.1.w"][0] == 2 * 1001
    assert out["trunk.part.0.experts.1.w"][0] == 1000
    with pytest.raises(PlanError, match="weight has no value for closing_norm"):
        run(loads(text.replace("exclude: [closing_norm]", ""), "r.yaml", folder=tmp_path), tmp_path / "no")


# --- checkpoints that are one file -------------------------------------------------------------------


def checkpoint(path: Path, seed: int) -> None:
    """Names as a Stable Diffusion checkpoint has them, with a buffer."""
    generator = torch.Generator().manual_seed(seed)
    names = ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight", "first_stage_model.decoder.conv_in.weight",
             "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight")  # fmt: skip
    state = {name: torch.randn(4, 3, generator=generator) for name in names} | {"ids": torch.arange(5)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if path.suffix == ".ckpt" else state, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".bin"])
def test_single_files_merge_without_config_or_tokenizer(suffix: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        checkpoint(tmp_path / f"{name}{suffix}", seed)
        checkpoint(tmp_path / f"{name}.safetensors", seed)
    base, one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "one", "two"))
    config = write_recipe(
        tmp_path,
        f"""
models:
  - {{model: {tmp_path}/one{suffix}, parameters: {{weight: 0.5}}}}
  - {{model: {tmp_path}/two{suffix}, parameters: {{weight: [{{filter: first_stage, value: 0}}, {{value: 0.25}}]}}}}
merge_method: task_arithmetic
base_model: {tmp_path}/base{suffix}
""",
    )
    native = write_recipe(tmp_path, config.read_text())
    assert main(["merge", str(native), str(tmp_path / "out"), "--quiet"]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert set(out) == set(base)
    assert torch.equal(out["ids"], torch.arange(5))
    assert not (tmp_path / "out/config.json").exists()
    for name in base:
        if name != "ids":
            weight = 0.0 if name.startswith("first_stage") else 0.25
            wanted = base[name] + 0.5 * (one[name] - base[name]) + weight * (two[name] - base[name])
            torch.testing.assert_close(out[name], wanted)
