"""`weightsmith.merge` from Python with progress and a tokenizer, and what a plan says of the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import weightsmith as ws
from tokens.test_one_vocabulary import BASE, model_at, tokenizer_at
from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import loads

TASK = "base: base\nmodels: {x: x, y: y}\nmethod: task_arithmetic\nparameters: {lambda: 1.0}\n"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trio")
    tokenizer_at(place / "base", BASE)
    tokenizer_at(place / "x", [*BASE, "green"])
    tokenizer_at(place / "y", ["<unk>", "<s>", "</s>", "blue", "red"])
    for i, (name, rows) in enumerate((("base", 5), ("x", 6), ("y", 5))):
        model_at(place / name, rows, i)
    return place


def test_progress_counts_to_the_bytes_written(trio: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    models = {"one": trio / "base", "two": trio / "base"}
    ws.merge(models, out=tmp_path / "out", progress=lambda done, total: seen.append((done, total)), threads=1)
    size = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    again: list[tuple[int, int]] = []
    ws.merge(models, progress=lambda done, total: again.append((done, total)))
    assert again[-1] == (size, size), "in memory too"


@pytest.mark.parametrize("tokenizer", ["union", "x", {"source": "union", "pad_to_multiple_of": 8}])
def test_a_tokenizer_is_as_in_a_recipe(trio: Path, tmp_path: Path, tokenizer: object) -> None:
    text = TASK + f"tokenizer: {json.dumps(tokenizer)}\n"
    run(loads(text, "r.yaml", folder=trio), tmp_path / "recipe", threads=1)
    models = {"x": trio / "x", "y": trio / "y"}
    ws.merge(models, "task_arithmetic", trio / "base", tmp_path / "out", tokenizer=tokenizer, lambda_=1.0, threads=1)
    in_memory = ws.merge(models, "task_arithmetic", trio / "base", tokenizer=tokenizer, lambda_=1.0)
    want = load_file(tmp_path / "recipe" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert want.keys() == got.keys() == in_memory.keys()
    assert all(torch.equal(want[n], got[n]) and torch.equal(want[n], in_memory[n]) for n in want)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "recipe/tokenizer.json").read_bytes()


def test_an_unknown_option_is_named(trio: Path) -> None:
    with pytest.raises(RecipeError, match="progres"):
        ws.merge({"x": trio / "base"}, progres=print)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", None),
        ("exclude: ['*embed*', '*lm_head*']\n", "float32; vocabulary of 5 rows, tokenizer of base; no chat template"),
        ("tokenizer: union\n", "float32; vocabulary of 6 rows, tokenizer of all models together; no chat template"),
        ("tokenizer: x\n", "float32; vocabulary of 6 rows, tokenizer of x; no chat template"),
        (
            "tokenizer: base\noutput: {dtype: bfloat16}\nchat_template: chatml\n",
            "bfloat16 (as output.dtype says); vocabulary of 5 rows, tokenizer of base; chat template: that of chatml",
        ),
    ],
)
def test_the_plan_says_what_the_result_will_be(
    trio: Path, more: str, said: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trio)
    Path("r.yaml").write_text(TASK + more)
    code = main(["plan", "r.yaml"])
    found = re.search(r"^result:   (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert (code, found is None) == ((2, True) if said is None else (0, False))
    if found is not None:
        said = f"{said}; the merged change about 1.7 times an expert's (in a sample)"
        assert found[1] == said
        assert main(["plan", "r.yaml", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)["output"]["result"]
        assert "; ".join(result.values()) == said
