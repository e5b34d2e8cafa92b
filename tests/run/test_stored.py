"""What becomes of tensors that are no ordinary weights: wide ones, running statistics, buffers of old files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from weightsmith.core.errors import PlanError
from weightsmith.core.problem import Code

ROUTER = "model.layers.0.mlp.gate.e_score_correction_bias"
NARROW = "model.layers.0.mlp.up_proj.weight"
NEAR = 30 + torch.arange(8) / 1000  # eight numbers that are one in bfloat16


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> str:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return str(path)


def run(tmp_path: Path, out: str = "out", **tree: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    result = ws.Recipe.model_validate(tree).run(tmp_path / out)
    return load_file(tmp_path / out / "model.safetensors"), [str(warning) for warning in result.warnings]


# --- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [torch.bfloat16, torch.float32])
def test_numbers_that_need_float32_keep_it(around: torch.dtype, tmp_path: Path) -> None:
    """Stored wider than the weights around them, or known to need it."""
    other = "model.layers.0.odd.weight"
    for name, add in (("a", 0.0), ("b", 0.002)):
        wide = {other: NEAR + add} if around == torch.bfloat16 else {}
        folder(tmp_path / name, {ROUTER: NEAR + add, NARROW: torch.ones(64, 8, dtype=around), **wide})
    models = {name: str(tmp_path / name) for name in "ab"}
    made, said = run(tmp_path, models=models, method="linear", output={"dtype": "bfloat16"})
    assert made[NARROW].dtype == torch.bfloat16
    for name in made.keys() - {NARROW}:
        torch.testing.assert_close(made[name], NEAR + 0.001, rtol=0, atol=1e-5)
    words = "2 tensors (" if around == torch.bfloat16 else f"{ROUTER} stays float32, not bfloat16"
    assert any(text.startswith(words) and "add a rule with dtype: bfloat16" in text for text in said)
    rules = [{"match": "*gate*", "dtype": "bfloat16"}, {"match": "*e_score*", "method": "keep"}]
    made, _ = run(tmp_path, "ruled", models=models, method="linear", output={"dtype": "bfloat16"}, rules=rules)
    assert torch.equal(made[ROUTER], NEAR.bfloat16())  # the first rule speaks of the dtype alone
    made, said = run(tmp_path, "plain", models=models, method="linear")
    assert made[ROUTER].dtype == torch.float32
    assert not said


def test_a_stack_of_unlike_models_is_rounded_whole(tmp_path: Path) -> None:
    wide = folder(tmp_path / "wide", {f"layers.{i}.w": torch.ones(2, 2) for i in range(2)})
    narrow = folder(tmp_path / "narrow", {f"layers.{i}.w": torch.ones(2, 2).bfloat16() for i in range(4)})
    stack = {"slices": [{"model": wide, "layers": [0, 2]}, {"model": narrow, "layers": [0, 4]}]}
    made, said = run(tmp_path, models={"s": stack}, method="passthrough", output={"dtype": "bfloat16"})
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert not said


def test_mergekit_configs_keep_it_too(tmp_path: Path) -> None:
    for name, add in (("a", 0.0), ("b", 0.002)):
        folder(tmp_path / name, {ROUTER: NEAR + add, NARROW: torch.ones(64, 8)})
    text = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\nmerge_method: linear\n"
    (tmp_path / "m.yml").write_text(text + "dtype: bfloat16\n")
    ws.Recipe.load(tmp_path / "m.yml").run(tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(made[ROUTER], NEAR + 0.001, rtol=0, atol=1e-5)
    assert made[NARROW].dtype == torch.bfloat16


def test_routers_that_transformers_keeps_in_float32(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"
    for kind, dtype in (("deepseek_v3", torch.float32), ("mixtral", torch.bfloat16)):
        model = folder(tmp_path / kind, {name: torch.ones(2, 2), NARROW: torch.ones(64, 8)}, model_type=kind)
        models = {"a": model}
        made, _ = run(tmp_path, f"out-{kind}", models=models, method="passthrough", output={"dtype": "bfloat16"})
        assert made[name].dtype == dtype


# --- running statistics ----------------------------------------------------------------------------

MEAN, VAR, COUNT = (f"bn.{leaf}" for leaf in ("running_mean", "running_var", "num_batches_tracked"))


def normed(value: float, count: int) -> dict[str, torch.Tensor]:
    ones = torch.ones(4)
    return {MEAN: value * ones, VAR: value * ones, COUNT: torch.tensor(count), "bn.weight": value * ones}


@pytest.mark.parametrize(
    "method",
    [
        {"task_arithmetic": {"lambda": 3}},
        [{"dare": {"density": 0.1}}, "task_arithmetic"],
        {"task_arithmetic": {"weight": {"b": 1, "c": -1}}},
        {"ties": {"density": 0.3}},
        "tsvm",
    ],
)
def test_running_statistics_are_averaged_whatever_the_method(method: Any, tmp_path: Path) -> None:
    names = {
        name: folder(tmp_path / name, normed(v, i))
        for i, (name, v) in enumerate(zip("abc", (2.0, 0.5, 1.5), strict=True))
    }
    base = names.pop("a")
    made, said = run(tmp_path, base=base, models=names, method=method)
    assert torch.equal(made[VAR], torch.ones(4))
    assert torch.equal(made[MEAN], torch.ones(4))
    assert made[COUNT].item() == 0
    assert any(text.startswith(f"2 tensors ({MEAN}, {VAR}) hold running statistics: averaged") for text in said)


def test_weights_of_ones_own_and_rules_that_name_statistics_count(tmp_path: Path) -> None:
    names = {name: folder(tmp_path / name, normed(v, 1)) for name, v in zip("bc", (0.5, 1.5), strict=True)}
    weights = {"b": 3.0, "c": 1.0}
    made, said = run(tmp_path, models=names, method="linear", parameters={"weight": weights})
    assert torch.equal(made[VAR], torch.full((4,), 0.75))
    assert not said
    made, _ = run(tmp_path, "sum", models=names, method={"linear": {"normalize": False, "weight": weights}})
    assert torch.equal(made[VAR], torch.full((4,), 0.75))
    broad = {"match": "bn.*", "method": {"linear": {"normalize": False}}}
    made, _ = run(tmp_path, "broad", models=names, method="linear", rules=[broad])
    assert torch.equal(made[VAR], torch.ones(4))
    assert torch.equal(made["bn.weight"], torch.full((4,), 2.0))
    made, _ = run(tmp_path, "named", models=names, method="linear", rules=[{**broad, "match": "*running_*"}])
    assert torch.equal(made[VAR], torch.full((4,), 2.0))


# --- buffers ---------------------------------------------------------------------------------------


def test_buffers_that_only_some_files_have(tmp_path: Path) -> None:
    """As transformers 4 wrote them and 5 does not; both load either."""
    ids, mask = torch.arange(5)[None], torch.ones(1, 1, 3, 3, dtype=torch.bool)
    old = {"embeddings.position_ids": ids, "h.0.attn.bias": mask, NARROW: torch.ones(2, 2)}
    names = {"old": folder(tmp_path / "old", old), "new": folder(tmp_path / "new", {NARROW: torch.zeros(2, 2)})}
    made, said = run(tmp_path, models=names, method="linear")
    assert torch.equal(made["embeddings.position_ids"], ids)
    assert said == ["2 tensors (embeddings.position_ids, h.0.attn.bias) are buffers that not all models have: kept "
                    "from old"]  # fmt: skip
    made, _ = run(tmp_path, "other", models=dict(reversed(names.items())), method="linear")
    assert set(made) == {NARROW}
    save_file({**old, "h.0.attn.bias": torch.ones(4)}, tmp_path / "old/model.safetensors")  # a bias, not a mask
    with pytest.raises(PlanError, match=r"h\.0\.attn\.bias is missing in new"):
        run(tmp_path, "refused", models=names, method="linear")


def test_a_trained_head_is_named_as_one(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {NARROW: torch.ones(2, 2), "lm_head.weight": torch.ones(5, 2)})
    tuned = folder(tmp_path / "tuned", {NARROW: torch.zeros(2, 2), "score.weight": torch.ones(3, 2)})
    with pytest.raises(PlanError) as caught:
        run(tmp_path, base=base, models={"t": tuned}, method="task_arithmetic")
    (text,) = str(caught.value).splitlines()
    assert "t is another kind of model than base, with another head" in text
    assert "score.weight" in text
    assert "lm_head.weight" in text
    assert "leave t out" in text
    assert "exclude" not in text
    with pytest.raises(PlanError, match="name the model that it was trained from as the base"):
        run(tmp_path, "average", models={"base_": base, "t": tuned}, method="linear")
    plain = folder(tmp_path / "plain", {NARROW: torch.ones(2, 2), "model.embed_tokens.weight": torch.ones(5, 2)})
    with pytest.raises(PlanError) as caught:
        run(tmp_path, "turned", models={"t": tuned, "p": plain}, method="linear", exclude=["model.embed_tokens.weight"])
    assert str(caught.value) == (
        "p lacks score.weight, a head that t has; name the model that both were trained from as the base, or leave p "
        'out, or keep it from t: add it to "exclude"'
    )


def test_heads_with_other_labels_are_no_vocabularies(tmp_path: Path) -> None:
    models = {
        name: folder(tmp_path / name, {NARROW: torch.ones(2, 2), "score.weight": torch.full((labels, 2), 1.0 * labels)})
        for name, labels in (("a", 3), ("b", 5))
    }
    with pytest.raises(PlanError) as caught:
        run(tmp_path, models=models, method="linear")
    assert str(caught.value) == (
        "unlike heads: score.weight has 3 labels in a but 5 in b; to keep the one of a add it to "
        '"exclude", or merge models with the same labels'
    )
    made, _ = run(tmp_path, models=models, method="linear", exclude=["score.weight"])
    assert torch.equal(made["score.weight"], torch.full((3, 2), 3.0))


# --- config.json -----------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "hidden_act": "silu", "rope_theta": 1e4}


def test_config_values_that_should_agree(tmp_path: Path) -> None:
    other = {**LLAMA, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "image_token_id": 7, "eos_token_id": 9}
    first = {**LLAMA, "rms_norm_eps": 1e-6, "image_token_id": 8, "eos_token_id": 2}
    tensors = {NARROW: torch.ones(2, 2)}
    names = {"a": folder(tmp_path / "a", tensors, **first), "b": folder(tmp_path / "b", tensors, **other)}
    result = ws.Recipe.model_validate({"models": names, "method": "linear"}).run(tmp_path / "out")
    said = [str(warning) for warning in result.warnings if warning.code is Code.COMPANION]
    assert said == [
        "config.json: image_token_id is 8 in a, 7 in b; the result has that of a",
        "config.json: rms_norm_eps is 1e-06 in a, 1e-05 in b; the result has that of a",
        "config.json: rope_theta is 10000.0 in a, 1000000.0 in b; the result has that of a",
    ]


KINDS = ["full_attention"] * 12


@pytest.mark.parametrize(
    ("mine", "other", "text"),
    [
        ({"partial_rotary_factor": 1}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 1.0 in a, 0.5 in b"),
        ({"scoring_func": "softmax"}, {"scoring_func": "sigmoid"}, "scoring_func is softmax in a, sigmoid in b"),
        ({"no_rope_layers": [0]}, {"no_rope_layers": [1]}, "no_rope_layers is [0] in a, [1] in b"),
        (
            {"rope_local_base_freq": 1e4},
            {"rope_local_base_freq": 1e5},
            "rope_local_base_freq is 10000.0 in a, 100000.0 in b",
        ),
        ({"topk_group": 4}, {"topk_group": 1}, "topk_group is 4 in a, 1 in b"),
        ({"vision_feature_layer": -1}, {"vision_feature_layer": -2}, "vision_feature_layer is -1 in a, -2 in b"),
        ({"use_qk_norm": True}, {"use_qk_norm": False}, "use_qk_norm is true in a, false in b"),
        (
            {"position_embedding_type": "absolute"},
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is absolute in a, relative_key in b",
        ),
        (
            {"attn_temperature_tuning": True},
            {"attn_temperature_tuning": False},
            "attn_temperature_tuning is true in a, false in b",
        ),
        (
            {"layer_types": KINDS},
            {"layer_types": [*KINDS[:10], "sliding_attention", "full_attention"]},
            'layer_types is [..., "full_attention", "full_attention"] (12 values) in a, '
            '[..., "sliding_attention", "full_attention"] (12 values) in b',
        ),
    ],
)
def test_what_changes_the_function_is_said(
    mine: dict[str, Any], other: dict[str, Any], text: str, tmp_path: Path
) -> None:
    names = {"a": folder(tmp_path / "a", {NARROW: torch.ones(2, 2)}, **LLAMA, **mine)}
    names["b"] = folder(tmp_path / "b", {NARROW: torch.zeros(2, 2)}, **LLAMA, **other)
    assert run(tmp_path, models=names, method="linear")[1] == [f"config.json: {text}; the result has that of a"]


@pytest.mark.parametrize(
    ("mine", "other", "text"),
    [
        ({}, {"sliding_window": 16}, "b says sliding_window 16, a says nothing"),
        ({"sliding_window": None}, {"sliding_window": 16}, "b says sliding_window 16, a says null"),
        ({"rms_norm_eps": 1e-5}, {}, "a says rms_norm_eps 1e-05, b says nothing"),
        ({}, {"hidden_act": None}, "a says hidden_act silu, b says null"),
    ],
)
def test_what_one_config_leaves_out_is_said(
    mine: dict[str, Any], other: dict[str, Any], text: str, tmp_path: Path
) -> None:
    names = {"a": folder(tmp_path / "a", {NARROW: torch.ones(2, 2)}, **{**LLAMA, **mine})}
    names["b"] = folder(tmp_path / "b", {NARROW: torch.zeros(2, 2)}, **{**LLAMA, **other})
    said = run(tmp_path, models=names, method="linear")[1]
    text = text.replace("says nothing", "says nothing (its class's default)")
    assert said == [f"config.json: {text}; the result has that of a"]


def test_a_base_of_rope_that_one_config_leaves_out_is_said(tmp_path: Path) -> None:
    bare = {field: value for field, value in LLAMA.items() if field != "rope_theta"}
    for first, second in (("a", "b"), ("b", "a")):
        at = tmp_path / first
        at.mkdir()
        configs = {first: bare, second: {**LLAMA, "rope_theta": 1e6}}
        names = {n: folder(at / n, {NARROW: torch.ones(2, 2) * (n == "a")}, **configs[n]) for n in ("a", "b")}
        assert run(at, models=names, method="linear")[1] == [
            f"config.json: {second} says rope_theta 1000000.0, {first} says nothing (its class's default); "
            "the result has that of a"
        ]


@pytest.mark.parametrize(
    "same",
    [
        {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_scaling": None, "rope_theta": 10000},
        {"hidden_act": "swish", "head_dim": 16},
        {"rope_theta": None},
        {"num_key_value_heads": 4, "scale_embedding": False, "tie_word_embeddings": False, "layer_types": KINDS},
        {"use_sliding_window": False, "sliding_window": 4096},
        {"hidden_act": None, "hidden_activation": "silu"},
        {"hidden_act": None, "rope_theta": None, "text_config": {"hidden_act": "silu", "rope_theta": 1e6}},
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1}},
    ],
)
def test_other_spellings_agree(same: dict[str, Any], tmp_path: Path) -> None:
    names = {"a": folder(tmp_path / "a", {NARROW: torch.ones(2, 2)}, **LLAMA)}
    names["b"] = folder(tmp_path / "b", {NARROW: torch.zeros(2, 2)}, **{**LLAMA, **same})
    assert not run(tmp_path, models=names, method="linear")[1]


def test_a_quantised_model_among_others_is_named(tmp_path: Path) -> None:
    names = {"a": folder(tmp_path / "a", {NARROW: torch.ones(2, 2)}, **LLAMA)}
    coded = {NARROW: torch.ones(2, 2).to(torch.float8_e4m3fn), f"{NARROW}_scale": torch.tensor(2.0)}
    names["b"] = folder(tmp_path / "b", coded, **LLAMA, quantization_config={"quant_method": "fp8"})
    made, said = run(tmp_path, models=names, method="linear")
    assert torch.equal(made[NARROW], torch.full((2, 2), 1.5))
    (text,) = said
    assert text.startswith("config.json: quantization is none in a, fp8 in b; what is merged are the weights, and")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is silu in a, gelu in b"),
        ({"num_attention_heads": 8}, "head_dim is 16 in a, 8 in b"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is gated-silu in a, relu in b"),
        ({"vision_config": {"hidden_act": "relu"}}, r"vision_config\.hidden_act is gelu in a, relu in b"),
    ],
)
def test_what_changes_the_meaning_of_weights_is_refused(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    tensors = {NARROW: torch.ones(2, 2)}
    inner = {"vision_config": {"hidden_act": "gelu"}, "feed_forward_proj": "gated-silu"}
    names = {"a": folder(tmp_path / "a", tensors, **LLAMA, **inner)}
    names["b"] = folder(tmp_path / "b", tensors, **{**LLAMA, **inner, **change})
    with pytest.raises(PlanError, match=f"config.json: {field}: their weights mean different things; leave b out"):
        run(tmp_path, models=names, method="linear")


def test_a_model_of_another_kind_is_one_problem(tmp_path: Path) -> None:
    def kind(name: str, said: str, tensors: dict[str, torch.Tensor]) -> str:
        made = folder(tmp_path / name, tensors)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": said}))
        return made

    vit = kind("vit", "vit", {"layer.0.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)})
    clip = kind("clip", "clip", {"text.0.weight": torch.ones(2, 2), "vision.1.weight": torch.ones(2)})
    more = {"text.0.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}
    with pytest.raises(PlanError, match=r"^b is another kind of model .*: no tensor of its blocks is in both; [^\n]*$"):
        run(tmp_path, base=vit, models={"a": vit, "b": kind("other", "clip", more)}, method="ties")
    with pytest.raises(PlanError) as caught:
        run(tmp_path, base=vit, models={"a": vit, "b": clip}, method="ties")
    assert str(caught.value) == (
        "b is another kind of model than base (clip, not vit): no tensor is in both; "
        "leave b out, or merge it with models of its kind"
    )
