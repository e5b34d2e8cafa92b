"""Recipes of mixtures: our words, mergekit-moe's, errors with their line; the verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.dense_models import moved, saved
from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError
from weightsmith.moe.recipe import load, loads

OURS = """
base: org/base
router: cheap_embed
experts_per_token: 1
output: {dtype: bfloat16}
experts:
  math: {model: org/math, prompts: [add, multiply], avoid: poem}
  code: {model: "org/code@v2", prompts: [[1, 2], [3]], noise: 0.1, residual: 0.5}
shared:
  always: org/base
"""
THEIRS = """
base_model: org/base
gate_mode: cheap_embed
experts_per_token: 1
dtype: bfloat16
experts:
  - source_model: org/math
    positive_prompts: [add, multiply]
    negative_prompts: [poem]
  - source_model: org/code@v2
    positive_prompts: [[1, 2], [3]]
    noise_scale: 0.1
    residual_scale: 0.5
shared_experts:
  - source_model: org/base
"""


def test_our_words_and_mergekits_mean_the_same() -> None:
    ours, theirs = loads(OURS), loads(THEIRS)
    assert theirs.model_copy(update={"shared": ours.shared}) == ours
    assert list(theirs.shared) == ["base"]
    assert ours.experts["code"].prompts == ((1, 2), (3,))
    assert loads(OURS, overrides=["experts_per_token=2"]).experts_per_token == 2


def test_experts_of_one_name_get_numbers() -> None:
    text = "base_model: a\nexperts:\n" + 3 * "  - {source_model: x/same, positive_prompts: [a]}\n"
    assert list(loads(text).experts) == ["same", "same-2", "same-3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "base: a\nexperts: {m: a}\nroutr: hidden\n",
            r"recipe:3:1: unknown key 'routr' in the recipe; did you mean 'router'\?",
        ),
        ("base: a\nexperts: {m: {modl: a}}\n", r"unknown key 'modl' in experts.m; did you mean 'model'\?"),
        (
            "base: a\nexperts: {m: a}\nrouter: hiden\n",
            r"recipe:3:1: router should be 'hidden', .*did you mean 'hidden'",
        ),
        ("base: a\nexperts: {m: {model: a, prompts: [[]]}}\n", r"should be texts, or lists of token numbers"),
        ("base: a\nexperts: {m: {model: a, noise: -1}}\n", r"noise should be greater than or equal to 0"),
        ("base: a\nexperts: {}\n", r"recipe:2:1: experts is empty"),
        ("base: a\n", r"the recipe has no 'experts'"),
        ("base_model: a\nexperts: [{}]\n", r"recipe:2:11: experts\[0\] has no 'source_model'"),
        ("base_model: a\ngate_moed: x\nexperts: []\n", r"unknown key 'gate_moed'.*did you mean 'gate_mode'"),
        ("base_model: a\nexperts: [{source_model: b, prompts: x}]\n", r"unknown key 'prompts'.*'positive_prompts'"),
        ("models: {a: a}\nmethod: ties\n", r'run it with "weightsmith merge"'),
        ("- a\n", r"the recipe should be a mapping, is a list"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        loads(text)


@pytest.mark.parametrize("text", [OURS, THEIRS])
def test_merge_says_which_verb_is_meant(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "moe.yaml").write_text(text)
    assert main(["merge", str(tmp_path / "moe.yaml"), str(tmp_path / "out")]) == 2
    assert 'builds a mixture of experts; run it with "weightsmith moe"' in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = saved(tmp_path / "base", "Llama", 0)
    moved(base, tmp_path / "math", 1, part=".mlp.")
    moved(base, tmp_path / "code", 2, part=".self_attn.")
    (tmp_path / "moe.yaml").write_text(
        "base: base\nrouter: cheap_embed\nexperts:\n"
        "  math: {model: math, prompts: [add two numbers]}\n  code: {model: code, prompts: ['def f():']}\n"
    )
    return tmp_path


def test_paths_are_relative_to_the_recipe(folder: Path) -> None:
    found = load(folder / "moe.yaml")
    assert found.base == str(folder / "base")
    assert found.experts["math"].model == str(folder / "math")


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["moe", str(folder / "moe.yaml"), str(folder / "out")]
    assert main([*words, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["architecture"] == "MixtralForCausalLM"
    assert not (folder / "out").exists()
    assert main([*words, "--set", "output.dtype=bfloat16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [w["text"].split()[0] for w in said["warnings"] if "moved more outside its MLPs" in w["text"]] == ["code"]
    tensors = load_file(folder / "out/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert sum(t.numel() for t in tensors.values()) == planned["parameters"]
    config = json.loads((folder / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert main(["verify", str(folder / "out"), "--rerun"]) == 0
    assert main([*words, "--set", "output.dtype=bfloat16", "--resume", "--quiet"]) == 0
    capsys.readouterr()
    assert main(words) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["moe", str(folder / "none.yaml"), str(folder / "x")]) == 2
    assert "no such recipe file" in capsys.readouterr().err
    (folder / "inside").mkdir()
    (folder / "inside/moe.yaml").write_text((folder / "moe.yaml").read_text().replace(": base", f": {folder}/base")
                                            .replace("model: ", f"model: {folder}/"))  # fmt: skip
    assert main(["moe", str(folder / "inside/moe.yaml"), str(folder / "inside"), "--overwrite"]) == 2
    assert "holds the input" in capsys.readouterr().err
