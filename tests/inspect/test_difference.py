"""How two models differ: closed forms, names on one side, dtypes, exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main
from weightsmith.engine.compare import gathered
from weightsmith.inspect.difference import by_layer, compare
from weightsmith.io.read.source import MemorySource

NAMES = ("layers.0.up_proj.weight", "layers.0.norm.weight", "layers.1.up_proj.weight", "head.weight")


def model(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(4) if "norm" in name else torch.randn(6, 4) for name in NAMES}


def test_figures_of_a_tensor_by_hand() -> None:
    a, b = {"w": torch.tensor([[3.0, 4.0], [0, 0]])}, {"w": torch.tensor([[3.0, 4.0], [0, 5.0]])}
    change = compare(MemorySource(a), MemorySource(b)).changes[0]
    assert change.sums is not None
    assert (change.sums.relative, change.sums.max_abs, change.changed) == (1.0, 5.0, 1)
    assert change.sums.cosine == pytest.approx(25 / (5 * math.sqrt(50)))


def test_layers_and_model_are_one_long_vector() -> None:
    a, b = model(0), model(1)
    found = compare(MemorySource(a), MemorySource(b), threads=2)
    assert [c.name for c in found.changes] == list(a)

    def check(names: list[str], sums: object) -> None:
        x, y = (torch.cat([m[n].double().ravel() for n in names]) for m in (a, b))
        assert sums.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)  # type: ignore[attr-defined]
        assert sums.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-12)  # type: ignore[attr-defined]
        assert sums.max_abs == float((y - x).abs().max())  # type: ignore[attr-defined]

    check(list(a), gathered(found.changes))
    layers = by_layer(found.changes)
    assert list(layers) == ["layers.0", "layers.1", ""]
    check([n for n in a if n.startswith("layers.0")], layers["layers.0"])


def test_sums_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.core.task import blocks
    from weightsmith.engine import compare as engine

    a, b = {"w": torch.randn(97, 31)}, {"w": torch.randn(97, 31)}
    whole = compare(MemorySource(a), MemorySource(b))
    monkeypatch.setattr(engine, "blocks", lambda key, low, high: blocks(key, low, high, size=64))
    assert compare(MemorySource(a), MemorySource(b)) == whole


def test_special_values() -> None:
    nan, inf = math.nan, math.inf
    a = {
        "same": torch.tensor([nan, 1.0]),
        "nan": torch.tensor([1.0, 2.0]),
        "zero": torch.zeros(2),
        "n": torch.tensor([1, 2]),
    }
    b = {
        "same": torch.tensor([nan, 1.0]),
        "nan": torch.tensor([nan, 2.0]),
        "zero": torch.ones(2),
        "n": torch.tensor([1, 3]),
    }
    found = {c.name: c for c in compare(MemorySource(a), MemorySource(b)).changes}
    assert found["same"].same
    assert found["nan"].changed == 1
    assert math.isnan(found["nan"].sums.max_abs)  # type: ignore[union-attr]
    assert found["zero"].sums.relative == inf  # type: ignore[union-attr]
    assert found["zero"].sums.cosine is None  # type: ignore[union-attr]
    assert (found["n"].changed, found["n"].sums) == (1, None)
    empty = {"e": torch.zeros(0, 3)}
    assert compare(MemorySource(empty), MemorySource(empty)).equal


def test_names_shapes_and_dtypes_that_differ() -> None:
    a = {"x": torch.ones(2), "y": torch.ones(2), "z": torch.ones(2), "s": torch.tensor(1.0)}
    b = {"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.ones(3), "w": torch.ones(2), "s": torch.tensor(1.0)}
    found = compare(MemorySource(a), MemorySource(b))
    assert [k.name for k in found.only_a] == ["z"]
    assert [k.name for k in found.only_b] == ["w"]
    assert found.shapes == (("y", (2,), (3,)),)
    assert [(c.name, c.same, c.dtypes) for c in found.changes] == [
        ("x", True, ("float32", "bfloat16")),
        ("s", True, ("float32", "float32")),
    ]
    assert not found.equal


def test_a_tied_tensor_equals_its_copy() -> None:
    embed = torch.randn(4, 2)
    tied = MemorySource({"embed": embed, "lm_head": embed})
    assert tied.aliases
    untied = MemorySource({"embed": embed.clone(), "lm_head": embed.clone()})
    assert compare(tied, untied).equal
    assert compare(untied, tied).equal
    other = compare(tied, MemorySource({"embed": embed.clone(), "lm_head": 2 * embed}))
    assert [c.name for c in other.changes if not c.same] == ["lm_head"]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, seed in (("a", 0), ("same", 0)):
        (tmp_path / name).mkdir()
        save_file(model(seed), tmp_path / name / "model.safetensors")
    (tmp_path / "b").mkdir()
    other = model(0)
    other["layers.1.up_proj.weight"] += 0.25
    other["extra"] = torch.ones(1)
    save_file(other, tmp_path / "b/model.safetensors")
    return tmp_path


def test_the_verb_says_what_differs_with_diffs_exit_codes(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, same = (str(folders / name) for name in ("a", "b", "same"))
    assert main(["diff", a, same]) == 0
    assert "equal: 4 tensors, every value" in capsys.readouterr().out
    assert main(["diff", a, b]) == 1
    out = capsys.readouterr().out
    assert "layers.1.up_proj.weight" in out
    assert "0.25" in out
    assert "layers.0.up_proj" not in out
    assert f"Only in {b}" in out
    assert "3 of 4 common tensors have equal values" in out
    assert main(["diff", a, b, "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["diff", a, str(folders / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["diff", a, b, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is False
    assert list(told["only_b"]) == ["extra"]
    assert told["tensors"]["layers.1.up_proj.weight"]["max_abs"] == pytest.approx(0.25)
    assert told["layers"]["layers.0"]["relative"] == 0
    assert np.isclose(told["layers"]["layers.1"]["relative"], told["tensors"]["layers.1.up_proj.weight"]["relative"])


def test_a_fault_is_no_difference(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weightsmith.inspect import difference

    monkeypatch.setattr(difference, "compare", lambda *_, **__: 1 / 0)
    assert main(["diff", str(folders / "a"), str(folders / "b")]) == 2
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
