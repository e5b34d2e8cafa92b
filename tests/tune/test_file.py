"""TUNE.yaml and `weightsmith tune`: a small language model, data by paths, a folder of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.io.read.open import open_source
from weightsmith.recipe.load import load as load_recipe
from weightsmith.tune.job import job
from weightsmith.tune.schema import loads

transformers = pytest.importorskip("transformers")


def llama(seed: int, near: Any = None) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    if near is not None:
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), near.parameters(), strict=True):
                mine.copy_(theirs + 0.05 * mine)
    return model


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kitchen")
    base = llama(0)
    base.save_pretrained(folder / "base")
    for i, name in enumerate(("math", "code")):
        llama(i + 1, base).save_pretrained(folder / name)
        lines = [json.dumps({"text": f"{name} {j} " * 6}) for j in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "empty.jsonl").write_text("")
    return folder


TUNING = """\
recipe:
  base: base
  models: {{math: math, code: code}}
  method: task_arithmetic
{what}
data: {{math: math.jsonl, code: {code}}}
batch: 4
length: 24
held_back: 0.25
every: 2
"""


def written(kitchen: Path, what: str = "preset: {adamerging: {steps: 3}}", code: str = "code.jsonl") -> Path:
    path = kitchen / "TUNE.yaml"
    path.write_text(TUNING.format(what=what, code=code))
    return path


def test_a_tuned_recipe_merges_to_the_tuned_model(kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", str(written(kitchen)), str(tmp_path / "out"), "--quiet"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "coefficients.safetensors", "curve.csv", "recipe.yaml", "report.html"
    ]  # fmt: skip
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.output.dtype is None
    assert main(["merge", str(tmp_path / "out" / "recipe.yaml"), str(tmp_path / "merged"), "--quiet"]) == 0
    merged, base = open_source(tmp_path / "merged"), open_source(kitchen / "base")
    assert list(merged.keys) == list(base.keys)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "validation" in page
    assert "model.layers.1.mlp.up_proj.weight" in page
    capsys.readouterr()


@pytest.mark.parametrize(
    "what",
    [
        "free: {lambda: {per: layer, start: 0.5}}\nobjective: labels\ndescent: {steps: 2, lr: 0.01}",
        "preset: {expert_merging: {steps: 2, accumulate: 2, layers: [1], top: 8}}",
        "preset: {expert_merging_pp: {steps: 2, accumulate: 2, chunks: {'*q_proj*': 3, '*': 1}}}",
        "preset: {atlas: {steps: 2, partition: 2}}",
        "preset: {adamerging_pp: {steps: 2, granularity: task}}",
    ],
)
def test_what_may_be_learned_of_a_language_model(kitchen: Path, tmp_path: Path, what: str):
    work = job(loads(written(kitchen, what).read_text(), folder=kitchen))
    found = work.run(tmp_path / "out")
    assert len([row for row in found.curve if "loss" in row]) == 2
    assert load_recipe(tmp_path / "out" / "recipe.yaml")
    names = next(iter(found.coefficients.values()))
    assert all(name in open_source(kitchen / "base").keys for name in names)


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        (
            "preset: adamergin",
            "code.jsonl",
            r"TUNE\.yaml:5:1: unknown preset 'adamergin'; did you mean 'adamerging'",
        ),
        (
            "preset: {adamerging: {step: 3}}",
            "code.jsonl",
            r"preset adamerging: unknown option 'step'; did you mean 'steps'\?",
        ),
        ("seed: 1", "code.jsonl", r"says not what to learn; add preset: adamerging"),
        ("free: {weight: tensor}", "code.jsonl", r"has 'free' without an objective; add objective: entropy"),
        (
            "preset: adamerging\nfree: {weight: tensor}",
            "code.jsonl",
            r"TUNE\.yaml:6:\d+: free: stands beside a preset",
        ),
        (
            "preset: adamerging\ndescnet: {steps: 3}",
            "code.jsonl",
            r"TUNE\.yaml:6:1: unknown key 'descnet' in the tuning; did",
        ),
        (
            "preset: adamerging\ndescent: {step: 3}",
            "code.jsonl",
            r"TUNE\.yaml:6:\d+: unknown key 'step' in descent; did",
        ),
        ("preset: adamerging", "gone.jsonl", r"TUNE\.yaml:6:26: no file or folder 'gone\.jsonl'\n"),
        ("preset: adamerging", "empty.jsonl", r"empty\.jsonl: no example in it"),
        ("preset: adamerging", "{train: code.jsonl, validation: code.jsonl}", r"is the data that is learned from"),
        (
            "free: {density: tensor}\nobjective: entropy",
            "code.jsonl",
            r"no stage of task_arithmetic has a parameter 'density'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, code: str, text: str
):
    import re

    assert main(["tune", str(written(kitchen, what, code)), str(tmp_path / "out")]) == 2
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_memory_is_predicted_and_refused(kitchen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", str(written(kitchen)), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["in all"] == sum(count for name, count in found.items() if name != "in all")
    assert found["activations"] > 0
    assert main(["tune", str(written(kitchen)), str(tmp_path / "out"), "--memory", "1MB"]) == 2
    assert "--memory 0.001 GB: about" in capsys.readouterr().err


def test_presets_and_objectives_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "--list"]) == 0
    out = capsys.readouterr().out
    assert "  adamerging_pp " in out
    assert "  imitate " in out


def test_a_task_without_an_expert(kitchen: Path):
    text = written(kitchen, "preset: expert_merging").read_text().replace("data: {math:", "data: {maths:")
    with pytest.raises(RecipeError, match=r"^data: maths is no model of the recipe"):
        job(loads(text, folder=kitchen))


def test_other_bytes_of_the_same_data_are_refused(kitchen: Path):
    (kitchen / "copy.jsonl").write_bytes((kitchen / "code.jsonl").read_bytes())
    text = written(kitchen, code="{train: code.jsonl, validation: copy.jsonl}").read_text()
    with pytest.raises(SourceError, match=r"copy\.jsonl is the data that is learned from"):
        job(loads(text, folder=kitchen))


def test_an_image_classifier_whose_module_has_other_names(tmp_path: Path):
    """A ViT's parameters are called otherwise in memory than on disk; coefficients have the names on disk."""
    import numpy as np

    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=8, patch_size=4, num_channels=1, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i + 1)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        base.save_pretrained(tmp_path / name)
        images = np.random.default_rng(i).standard_normal((8, 1, 8, 8)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=images, y=np.arange(8) % 3)
    text = """
recipe: {base: base, models: {a: a, b: b}, method: task_arithmetic}
preset: {adamerging: {steps: 2}}
data: {a: a.npz, b: b.npz}
batch: 4
"""
    found = job(loads(text, folder=tmp_path)).run(tmp_path / "out")
    on_disk = open_source(tmp_path / "base").keys
    assert set(found.coefficients["weight"]) == set(on_disk)
    moved = [v for v in found.coefficients["weight"].values() if not torch.equal(v, torch.full((2,), 0.3))]
    assert len(moved) > len(on_disk) // 2
    assert sum(found.classes["a"].values()) == 8
    labelled = text.replace("preset: {adamerging: {steps: 2}}", "preset: {atlas: {steps: 2}}")
    assert job(loads(labelled, folder=tmp_path)).run(tmp_path / "labelled").curve
    adapted = text.replace("preset: {adamerging: {steps: 2}}", "preset: {atlas: {goal: test_time, steps: 2}}")
    assert job(loads(adapted, folder=tmp_path)).run(tmp_path / "adapted").curve
