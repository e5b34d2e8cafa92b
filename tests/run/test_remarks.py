"""What plans say of choices that are allowed and yet seldom meant, with the tensors that they concern."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kit import texts
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import Recipe

SHAPES = {
    **{"layers.0.mlp.weight": (8, 12), "layers.1.mlp.weight": (8, 12)},
    **{"types.weight": (2, 8), "more.weight": (8, 2), "short.bias": (4,), "number": ()},
}


def notes(method: Any, count: int = 3, strict: bool = True) -> list[str]:
    sources = {n: MemorySource({k: torch.zeros(s) for k, s in SHAPES.items()}, n) for n in ["base", *"abc"[:count]]}
    recipe = Recipe.model_validate({"base": "base", "models": {n: n for n in "abc"[:count]}, "method": method})
    return texts(make_plan(recipe, sources=Inputs(sources.pop("base"), sources), strict=strict).warnings)


def lines(count: int = 3, **parameters: Any) -> list[str]:
    return notes(["task_arithmetic", {"lines": parameters}], count)


def crumbs(**parameters: Any) -> list[str]:
    return notes([{"breadcrumbs": parameters}])


def test_few_directions_in_the_common_space_only() -> None:
    said = "iso_cts: no direction of its own is left for each of 3 models, so this is iso_c"
    assert notes({"iso_cts": {}}) == [f"{said}: types.weight and 1 more"], "3 models in 2 rows"
    assert notes({"iso_cts": {"common_space_fraction": 1.0}}) == [f"{said}: layers.0.mlp.weight and 3 more"]
    assert notes({"iso_cts": {}}, count=1) == notes({"iso_c": {}}) == []


def test_breadcrumbs_that_leave_nothing_or_less_than_asked_for() -> None:
    said = "breadcrumbs: density + remove_top is more than 1: of each row only {} survives"
    assert crumbs(scope="row", density=0.9, remove_top=0.3)[0] == said.format("0.7")
    assert crumbs(scope="row", density={"a": 0.9, "b": 0.5, "c": 0.6}, remove_top=0.5)[0] == said.format("0.5")
    assert crumbs(scope="row", density=0.9, remove_top=0.1) == crumbs(density=0.9, remove_top=0.3) == []
    empty = "breadcrumbs: with these shares no entry of only {} survives, so nothing changes there: {}"
    assert crumbs(density=0.15, remove_top=0.0) == [empty.format(4, "short.bias")]
    rows = crumbs(density=0.15, remove_top=0.0, scope="row")
    assert rows == [empty.format(2, "more.weight"), empty.format(4, "short.bias")]
    assert empty.format(8, "types.weight") in crumbs(density=0.2, remove_top=0.2, scope="row", remove_first=False)


def test_depths_that_grow_the_wrong_way() -> None:
    assert lines(alpha=1.5, beta=-0.3) == [
        "lines: alpha = 1.5 is above 1: more than the whole change; "
        "beta = -0.3 is below 0: deep blocks get less than shallow ones"
    ]
    said = "lines: alpha 0 gives embeddings, final norm and head back to the base"
    assert lines(count=1, alpha=0.0)[0].startswith(said)
    assert lines(count=1, alpha=0.0, outside="depth") == lines() == lines(alpha=1.0, beta=0.0) == []


@pytest.mark.parametrize(("counted", "more"), [(2, {}), (1, {"num_nextn_predict_layers": 1}), (None, {})])
def test_a_configuration_that_fits(counted: int | None, more: dict[str, int], tmp_path: Path) -> None:
    assert depth_plan(tmp_path, {**({"num_hidden_layers": counted} if counted else {}), **more}) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"n_layer": 3}, "n_layer = 3"),
        ({"text_config": {"num_hidden_layers": 4}, "num_layers": 2}, "num_hidden_layers = 4"),
    ],
)
def test_depth_needs_a_configuration_that_agrees(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert depth_plan(tmp_path, config) == [
        f"lines: works by depth, but config.json says {said}, the weights hold 2 blocks in layers; "
        "correct the one or the other"
    ]


def adapter(folder: Path, base: str, *modules: str) -> str:
    folder.mkdir()
    sides = {"A": torch.ones(2, 12), "B": torch.ones(8, 2)}
    names = {f"base_model.model.{m}.lora_{side}.weight": t.clone() for m in modules for side, t in sides.items()}
    save_file(names, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"], "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_adapters_of_unlike_modules_and_bases(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({k: torch.zeros(s) for k, s in SHAPES.items()}, tmp_path / "base" / "model.safetensors")
    both = ("layers.0.mlp", "layers.1.mlp")
    adapters = {
        "all": adapter(tmp_path / "all", "org/one", *both),
        "half": adapter(tmp_path / "half", "org/one", both[0]),
        "other": adapter(tmp_path / "other", "org/two", *both),
    }

    def said(*names: str) -> list[str]:
        models = {n: {"model": str(tmp_path / "base"), "adapter": adapters[n]} for n in names}
        tree = {"base": str(tmp_path / "base"), "models": models, "method": "knots"}
        recipe = Recipe.model_validate(tree)
        made = make_plan(recipe, sources=open_inputs(recipe))
        return [note.replace(str(tmp_path), "") for note in texts(made.warnings)]

    own = "{}: says it was trained on 'org/{}', and is put on /base: make sure that these are the same model"
    assert said("all") == [own.format("all", "one")]
    assert said("all", "half")[:1] == [
        "half does not change 1 of 2 tensors that other adapters change (layers.1.mlp.weight): its task vector is zero "
        "there"
    ]
    assert said("all", "other") == [
        "adapters name unlike base models (all: org/one, other: org/two); all are put on the one given here",
        own.format("all", "one"),
        own.format("other", "two"),
    ]


def depth_plan(folder: Path, config: dict[str, Any]) -> list[str]:
    """The problems of a merge by depth of two blocks whose configuration says `config`."""
    for name in ("base", "a"):
        (folder / name).mkdir()
        save_file({k: torch.zeros(s) for k, s in SHAPES.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    tree = {"base": str(folder / "base"), "models": {"a": str(folder / "a")}, "method": ["task_arithmetic", "lines"]}
    recipe = Recipe.model_validate(tree)
    return texts(make_plan(recipe, sources=open_inputs(recipe), strict=False).problems)
