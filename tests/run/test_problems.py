"""Problems as values: their codes, one line for many tensors, and what a missing model does not hide or cause."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kit import noise, texts
from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, RecipeError, SourceError, problems_of
from weightsmith.core.problem import Code, Problem, Problems, Tensors
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.load import loads

SHAPES = {f"model.layers.{i}.mlp.{part}.weight": (4, 4) for i in range(3) for part in ("up_proj", "down_proj")}


def planned(models: Mapping[str, Mapping[str, tuple[int, ...]]], method: Any = "average", **more: Any) -> Plan:
    """The plan of models in memory, given by shapes; 'base' is the base."""
    sources = {n: MemorySource({k: noise(*s) for k, s in own.items()}, n) for n, own in models.items()}
    base = sources.pop("base", None)
    tree = {"models": {n: n for n in sources}, "method": method, **({"base": "base"} if base else {}), **more}
    return make_plan(loads(json.dumps(tree)), sources=Inputs(base, sources), strict=False)


def test_errors_carry_problems() -> None:
    one = Problem(Code.SHAPE, "x", "x has shape 1; https://me:secret@host/x")
    error = PlanError([one, "a text"])
    assert [p.code for p in error.problems] == [Code.SHAPE, Code.FIT]
    assert "secret" not in error.problems[0].text + str(error)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    assert problems_of(SourceError("gone")) == (Problem(Code.INPUT, "", "gone"),)
    assert one.of("math") == Problem(Code.SHAPE, "math: x", f"math: {one.text}")


def test_a_fault_of_a_file_says_where() -> None:
    with pytest.raises(RecipeError) as caught:
        loads("models: {a: a}\nmethod: ties\nwieght: 1\nparameters: {density: 7}\n")
    first, second = caught.value.problems
    assert (first.code, first.where) == (Code.UNKNOWN, "recipe:3:1")
    assert second.where == "recipe:4:14"


def test_tensors_share_a_line() -> None:
    problems = Problems()
    for name in ("a", "b", "c"):
        problems.share(Code.MISSING, name, "m", lambda t: f"{t} {t['is|are']} missing; add {t['it|them']}")
        problems.share(Code.MISSING, name, "m", lambda t: f"{t} {t['is|are']} missing; add {t['it|them']}")
    problems.share(Code.MISSING, "z", "other", lambda t: f"{t} {t['is|are']} missing")
    assert texts(problems) == ["3 tensors (a, b, ...) are missing; add them", "z is missing"]
    assert str(Tensors(["a", "b"])) == "2 tensors (a, b)"


def test_a_prefix_is_two_lines_however_many_tensors_there_are() -> None:
    plan = planned({"base": SHAPES, "a": {f"bert.{name}": shape for name, shape in SHAPES.items()}})
    surplus, missing = plan.problems
    assert (missing.code, surplus.code) == (Code.MISSING, Code.SURPLUS)
    assert missing.text.startswith("6 tensors (model.layers.0.mlp.up_proj.weight, model.layers.0.mlp.down_proj.weight,")
    assert "are missing in a (a); their names begin with 'bert.' there; to keep them from the base add" in missing.text
    assert "are in a but not in base; to carry them over unchanged add them" in surplus.text
    back = planned({"base": {f"bert.{n}": s for n, s in SHAPES.items()}, "a": SHAPES})
    assert any("their names lack 'bert.' there" in text for text in texts(back.problems))


def test_shapes_dtypes_and_integers_are_lines_of_their_own() -> None:
    other = dict.fromkeys(SHAPES, (3, 4))
    (shape,) = planned({"base": SHAPES, "a": other}).problems
    assert shape.code is Code.SHAPE
    assert "6 tensors" in shape.text
    assert "have other shapes in base than in a (the first: [4, 4] and [3, 4]); to keep those of base" in shape.text


def test_plan_prints_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shapes in (("base", SHAPES), ("a", dict(list(SHAPES.items())[1:]))):
        (tmp_path / name).mkdir()
        save_file({k: torch.zeros(s) for k, s in shapes.items()}, tmp_path / name / "model.safetensors")
    (tmp_path / "r.yaml").write_text("base: base\nmodels: {a: a}\nmethod: ties\n")
    assert main(["plan", str(tmp_path / "r.yaml"), "--json"]) == 2
    (said,) = json.loads(capsys.readouterr().out)["problems"]
    assert said["code"] == "missing"
    assert said["where"] == next(iter(SHAPES))
    assert said["text"].startswith(f"{said['where']} is missing in a ")
