"""A recipe with many mistakes, of every kind: one round says them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main

WRONG = """\
base: base
models:
  names: names
  code: {model: cdoe, weight: "0.5"}
method: [{dare: {densty: 0.5}}, {ties: {density: 1.5, scope: tensors}}]
exclude: ["embedings*"]
rules:
  - {match: "*.quary.*", parameters: {density: 0.5}}
  - {role: mpl, method: average}
  - {match: "*.key.*", method: average}
output: {dtype: bf16x}
sede: 3
"""
SAID = [
    "4:23: ties: weight = '0.5' is a text; write 0.5 without quotes",
    "5:18: unknown key 'densty' in method[0].dare; did you mean 'density'?",
    "5:41: ties: density = 1.5 is outside (0, 1]; write 1.5% as 0.015",
    "5:55: ties: scope = 'tensors' is outside global | tensor; did you mean 'tensor'?",
    "9:6: rules[1].role: unknown role 'mpl'; known: ",
    "11:10: output.dtype: unknown dtype 'bf16x'; did you mean 'bfloat16'?",
    "12:1: unknown key 'sede' in the recipe; did you mean 'seed'?",
    "code: cdoe: no such file or folder; did you mean 'code'?",
    "exclude: no tensor (of the models that are there, without code) matches 'embedings*'; did you mean 'embeddings'?",
    "rules[0]: no tensor (of the models that are there, without code) matches '*.quary.*'; did you mean 'query'?",
]


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ("embeddings.weight", "layers.0.query.weight", "layers.0.key.weight")
    for model in ("base", "names", "code"):
        (tmp_path / model).mkdir()
        save_file({name: torch.ones(2, 2) for name in names}, tmp_path / model / "model.safetensors")
    (tmp_path / "wrong.yaml").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize("command", [["plan", "wrong.yaml"], ["merge", "wrong.yaml", "out", "--set", "seed=1,2"]])
def test_every_mistake_in_one_round(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    head, *lines = capsys.readouterr().err.rstrip().splitlines()
    assert head == f"error: {len(SAID)} problems:"
    for line, said in zip(lines, SAID, strict=True):
        assert line.removeprefix("  - ").removeprefix("wrong.yaml:").startswith(said)


def test_models_that_cannot_be_told_hide_nothing(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kitchen / "wrong.yaml").write_text("base: base\nmodels: 3\nmethod: average\nsede: 3\n")
    assert main(["plan", "wrong.yaml"]) == 2
    shown = capsys.readouterr().err
    assert "2 problems" in shown
    assert "unknown key 'sede'" in shown
