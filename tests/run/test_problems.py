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
from weightsmith.jobs.merge import preview
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
    assert (
        "are missing in a (a); their names begin with 'bert.' there (names: {'bert.': ''} maps them);" in missing.text
    )
    assert "to keep them from the base add" in missing.text
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


# --- a model that is missing --------------------------------------------------------------------------


def on_disk(folder: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> str:
    folder.mkdir(parents=True)
    save_file({k: noise(*s) for k, s in shapes.items()}, folder / "model.safetensors")
    return str(folder)


def refused(tree: Mapping[str, Any]) -> list[Problem]:
    return list(preview(loads(json.dumps(tree))).problems)


def test_a_missing_base_causes_no_other_problem_and_hides_none(tmp_path: Path) -> None:
    odd = {**dict(list(SHAPES.items())[1:]), "model.new": (2,)}
    models = {"a": on_disk(tmp_path / "a"), "b": on_disk(tmp_path / "b", odd)}
    adapter = {"model": str(tmp_path / "gone"), "adapter": str(tmp_path / "adapter")}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"")
    tree = {
        "base": str(tmp_path / "gone"),
        "models": {**models, "c": str(tmp_path / "adapter"), "d": {**adapter, "stats": str(tmp_path / "none")}},
        "method": [{"ties": {"density": 0.3}}],
        "exclude": ["*up_porj*"],
    }
    found = refused(tree)
    assert {p.code for p in found} == {Code.INPUT, Code.MISSING, Code.SURPLUS, Code.UNMATCHED}
    assert [p.text.split(":")[0] for p in found if p.code is Code.INPUT] == ["base", "d", "d"]
    assert not any("needs a base" in text for text in texts(found))


def test_words_that_no_tensor_meets_are_said_without_a_model(tmp_path: Path) -> None:
    """Those of the models that are there count: a missing one could hold more, but hardly does."""
    models = {"a": on_disk(tmp_path / "a"), "b": str(tmp_path / "gone")}
    rules = [
        {"match": "down", "method": "keep"},
        {"role": "router", "method": "keep"},
        {"layers": [7, 9], "method": "keep"},
    ]
    tree = {"base": on_disk(tmp_path / "base"), "models": models, "method": "ties", "exclude": ["zzz*"], "rules": rules}
    unmet = [p.text for p in refused(tree) if p.code is Code.UNMATCHED]
    assert unmet[0] == "exclude: no tensor (of the models that are there, without b) matches 'zzz*'"
    assert unmet[1].endswith("matches 'down'; a rule with role: down means the tensors of that role")
    assert [text.split(":")[0] for text in unmet] == ["exclude", "rules[0]", "rules[1]", "rules[2]"]


@pytest.mark.parametrize("gone", ["base", "a", "both"])
def test_methods_are_checked_without_the_models(gone: str, tmp_path: Path) -> None:
    there = {name: on_disk(tmp_path / name) for name in ("base", "a") if gone not in (name, "both")}
    place = {name: there.get(name, str(tmp_path / "gone" / name)) for name in ("base", "a")}
    tree = {"base": place["base"], "models": {"a": place["a"]}, "method": "model_stock"}
    found = refused(tree)
    assert [p.code for p in found if p.code is not Code.INPUT] == [Code.COUNT]
    assert sum(p.code is Code.INPUT for p in found) == (2 if gone == "both" else 1)
    tree = {"models": {"a": place["a"]}, "method": "ties"}
    assert any(p.code is Code.NO_BASE for p in refused(tree))


def test_a_tokenizer_of_a_missing_model_is_no_problem_of_its_own(tmp_path: Path) -> None:
    wide = {"model.embed_tokens.weight": (9, 4), **SHAPES}
    narrow = {"model.embed_tokens.weight": (8, 4), **SHAPES}
    models = {"a": on_disk(tmp_path / "a", wide), "b": on_disk(tmp_path / "b", narrow), "c": str(tmp_path / "gone")}
    tree = {"models": models, "method": "average", "tokenizer": "c", "chat_template": "c"}
    (only,) = refused(tree)
    assert only.text.startswith("c: ")


def test_statistics_that_cannot_be_opened_are_not_asked_for(tmp_path: Path) -> None:
    models = {"a": {"model": on_disk(tmp_path / "a"), "stats": str(tmp_path / "none")}}
    assert [p.code for p in refused({"models": models, "method": "fisher"})] == [Code.INPUT]


# --- globs, roles and blocks that nothing meets -----------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"exclude": ["*up_porj*"]}, "exclude: no tensor matches '*up_porj*'; did you mean 'up_proj'?"),
        (
            {"exclude": ["model.layer.0.mlp.up_proj.weight"]},
            "exclude: no tensor matches 'model.layer.0.mlp.up_proj.weight'; "
            "did you mean 'model.layers.0.mlp.up_proj.weight'?",
        ),
        ({"exclude": ["model.layer.*"]}, "exclude: no tensor matches 'model.layer.*'; did you mean 'layers'?"),
        ({"exclude": ["layers.0.*"]}, "exclude: no tensor matches 'layers.0.*'; did you mean '*layers.0.*'?"),
        ({"exclude": ["up_proj"]}, "exclude: no tensor matches 'up_proj'; did you mean '*up_proj*'?"),
        (
            {"rules": [{"match": ["*up_proj*", "*attn*"], "method": "keep"}]},
            "rules[0]: no tensor matches '*attn*'",
        ),
        (
            {"rules": [{"role": "q", "method": "keep"}]},
            "rules[0]: no tensor plays the role 'q'; there are up, down",
        ),
        (
            {"rules": [{"layers": [3, 9], "method": "keep"}]},
            "rules[0]: no tensor lies in the blocks [3, 9]; the last block is 2",
        ),
        (
            {"rules": [{"role": ["q", "k"], "method": "keep"}]},
            "rules[0]: no tensor plays the role 'q' or 'k'; there are up, down",
        ),
        (
            {"rules": [{"role": "up", "match": "*down*", "method": "keep"}]},
            "rules[0]: no tensor meets all of its conditions",
        ),
        (
            {"parameters": {"weight": [{"match": "*mpl*", "value": 0.3}, 0.5]}},
            "parameters.weight[0]: no tensor matches '*mpl*'; did you mean 'mlp'?",
        ),
    ],
)
def test_what_no_tensor_meets_is_a_problem(more: Mapping[str, Any], text: str) -> None:
    models = {"a": SHAPES, "b": SHAPES}
    (problem,) = planned(models, **more).problems
    assert problem == Problem(Code.UNMATCHED, text.split(":")[0], text)


def test_rules_for_other_models_are_optional() -> None:
    rule = {"match": "*attn*", "method": "keep", "optional": True}
    value = [{"role": "q", "value": 0.1, "optional": True}, 0.5]
    plan = planned({"a": SHAPES, "b": SHAPES}, rules=[rule], parameters={"weight": value})
    assert plan.problems == ()
    assert [w.code for w in plan.warnings] == [Code.UNMATCHED] * 2


def test_tied_names_and_carried_tensors_are_met() -> None:
    source = MemorySource({**{k: noise(*s) for k, s in SHAPES.items()}, "x": noise(2)}, "a")
    source.aliases = {"lm_head.weight": "x"}
    recipe = loads(json.dumps({"models": {"a": "a"}, "method": "average", "exclude": ["lm_head.weight"]}))
    assert make_plan(recipe, sources=Inputs(None, {"a": source}), strict=False).problems == ()


def test_a_faulty_recipe_also_names_the_models_that_are_not_there(tmp_path: Path) -> None:
    there, gone = on_disk(tmp_path / "there"), str(tmp_path / "their")
    text = f"base: {gone}\nmodels: {{a: {there}, b: org/name, c: {{model: {gone}2, stats: {gone}3}}}}\nmethod: tise\n"
    with pytest.raises(RecipeError) as caught:
        loads(text)
    said = texts(caught.value.problems)
    assert said[0] == f"recipe:1:1: base: {gone}: no such file or folder; did you mean {there!r}?"
    assert f"c: {gone}2: no such file or folder" in said[1]
    assert f"c: {gone}3: no such file or folder" in said[2]
    assert "tise" in said[3]
    assert len(said) == 4


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("models.c.weight=0.5", "--set models.c.weight=0.5: no model is called 'c'; known: a, b"),
        ("models.mat.weight=1", "--set models.mat.weight=1: no model is called 'mat'; known: a, b"),
        ("parameters.densty=0.2", "--set parameters.densty=0.2: unknown key 'densty' in parameters; did you mean"),
    ],
)
def test_set_names_what_is_there(setting: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads("models: {a: a, b: b}\nmethod: ties\nbase: base\n", overrides=[setting])
    assert str(caught.value).startswith(text)
    assert loads("models: {a: a}\nmethod: average\n", overrides=["models.c.model=x"]).models.keys() == {"a", "c"}


def test_a_module_that_takes_nothing(tmp_path: Path) -> None:
    sees = {**SHAPES, "visual.conv.weight": (2, 2)}
    a, b = on_disk(tmp_path / "a", sees), on_disk(tmp_path / "b", SHAPES)
    modules = {"vision": {"match": "visal.*", "model": a}, "text": {"model": b}}
    (problem,) = refused({"models": {"m": {"modules": modules}}, "method": "average"})
    assert problem.text == f"m: module vision: no tensor of {a} that is left matches 'visal.*'"
