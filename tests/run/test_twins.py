"""A model that is the base, or another one, under another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main
from weightsmith.plan.remarks import twins


def written(folder: Path, seed: int) -> None:
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    save_file({"w": torch.randn(40, 30, generator=draw)}, folder / "model.safetensors")


def test_copies_of_the_base_and_of_each_other_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in {"base": 0, "same": 0, "a": 1, "again": 1, "b": 2}.items():
        written(tmp_path / name, seed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: ./base\nmodels: {a: ./a, same: ./same, b: ./b, again: ./again}\nmethod: opcm\n")
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "seems to hold" in line]
    assert len(said) == 2
    assert "same seems to hold the weights of base" in said[0]
    assert said[0].endswith("its task vector is zero")
    assert "again seems to hold the weights of a " in said[1]
    assert said[1].endswith("the two count twice")


def test_what_is_not_known_is_not_said() -> None:
    file = {"size": 8, "header": "h", "sample": "s"}
    assert len(list(twins({"base": {"files": {"x": file}}, "a": {"files": {"y": file}}}))) == 1
    other = [{**file, "size": 9}, {**file, "header": "i"}, {**file, "sample": "t"}]
    assert list(twins({f"m{i}": {"files": {"x": one}} for i, one in enumerate(other)})) == []
    assert list(twins({"base": {}, "a": {}, "b": {"files": {}}, "c": {"files": {"x": {"size": 8}}}})) == []
