"""Genes and the recipes that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.pantry import MODELS, stocked, tree
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.jobs.nested import open_inputs
from weightsmith.search.genes import Gene
from weightsmith.search.schema import SearchFile
from weightsmith.search.setting import space_of
from weightsmith.search.space import Space, key_of


def space(folder: Path, **more: Any) -> Space:
    file = SearchFile.model_validate(tree(folder, **more))
    return space_of(file, open_inputs(file.recipe))


@pytest.fixture
def pantry(tmp_path: Path) -> Path:
    return stocked(tmp_path)


def test_gene_shares_go_both_ways() -> None:
    for gene in (Gene("x", 2, 6), Gene("x", 1e-3, 1, log=True), Gene("x", 2, 6, integer=True), Gene("x", values="abc")):
        for share in (0.0, 0.1, 0.5, 0.99, 1.0):
            value = gene.at(share)
            assert gene.at(gene.share(value)) == pytest.approx(value) if not gene.values else value in "abc"
    assert [Gene("x", 0, 1).at(s) for s in (-1, 2)] == [0, 1]
    assert Gene("x", 1e-4, 1, log=True).at(0.5) == pytest.approx(1e-2)
    assert Gene("x", 0, 1, integer=True).grid(5) == [0, 1]
    assert Gene("x", 0, 1).grid(3) == [0, 0.5, 1]


def test_a_gene_for_each_model(pantry: Path) -> None:
    found = space(pantry)
    assert [gene.name for gene in found.genes] == ["weight/a", "weight/b", "weight/c"]
    recipe = found.recipe({"weight/a": 0.1, "weight/b": 0.2, "weight/c": 0.3})
    assert recipe.parameters == {"weight": {"a": 0.1, "b": 0.2, "c": 0.3}}


def test_groups_of_blocks_and_parts(pantry: Path) -> None:
    spec = {"low": 0.0, "high": 1.0, "per": ["layers", "part"], "group": 2, "parts": {"mlp": "*mlp*"}}
    found = space(pantry, space={"weight": spec})
    assert [gene.name for gene in found.genes] == [
        "weight/mlp/0:2", "weight/mlp/2:4", "weight/rest/0:2", "weight/rest/2:4"
    ]  # fmt: skip
    point = {gene.name: (i + 1) / 10 for i, gene in enumerate(found.genes)}
    assert found.recipe(point).parameters["weight"] == [
        {"match": "*mlp*", "layers": [0, 2], "value": 0.1},
        {"match": "*mlp*", "layers": [2, 4], "value": 0.2},
        {"match": "*mlp*", "role": "embed", "layers": "outside", "value": 0.1},
        {"match": "*mlp*", "layers": "outside", "value": 0.2},
        {"layers": [0, 2], "value": 0.3},
        {"layers": [2, 4], "value": 0.4},
        {"role": "embed", "layers": "outside", "value": 0.3},
        {"layers": "outside", "value": 0.4},
    ]


def test_smooth_groups_are_a_ramp(pantry: Path) -> None:
    spec = {"low": 0.0, "high": 1.0, "per": ["model", "layers"], "group": 2, "smooth": True}
    found = space(pantry, space={"weight": spec})
    point = {gene.name: (i + 1) / 10 for i, gene in enumerate(found.genes)}
    # models vary fastest: 0:2 of a, b, c, then 2:4
    assert found.recipe(point).parameters["weight"] == {"a": [0.1, 0.4], "b": [0.2, 0.5], "c": [0.3, 0.6]}


def test_methods_stages_and_paths(pantry: Path) -> None:
    recipe = tree(pantry)["recipe"] | {
        "method": [{"dare": {"density": 0.5}}, {"ties": {"density": 0.5}}],
        "parameters": {},
    }
    found = space(
        pantry, recipe=recipe,
        space={"dare.density": [0.1, 0.9], "seed": {"low": 0, "high": 9, "integer": True},
               "models.a.weight": [0.0, 1.0]},
    )  # fmt: skip
    made = found.recipe({"dare.density": 0.25, "seed": 3, "models.a.weight": 0.75})
    assert made.method[0].parameters == {"density": 0.25}
    assert made.method[1].parameters == {"density": 0.5}
    assert made.seed == 3
    assert made.models["a"].parameters == {"weight": 0.75}
    chosen = space(pantry, space={"method": {"values": ["linear", "ties"]}}).recipe({"method": "ties"})
    assert chosen.method[0].name == "ties"


def test_members_and_what_is_said_of_those_left_out(pantry: Path) -> None:
    found = space(pantry, members={"least": 2})
    point = {gene.name: gene.begin for gene in found.genes}
    point |= {"member/a": False, "member/b": False, "weight/c": 0.5}
    recipe = found.recipe(point)  # too few: the first other one fills up
    assert list(recipe.models) == ["a", "c"]
    assert set(recipe.parameters["weight"]) == {"a", "c"}
    assert key_of(recipe) == key_of(found.recipe({**point, "member/a": True, "weight/b": 0.9}))


def test_slices_are_stacked(pantry: Path) -> None:
    found = space(pantry, space={}, slices={"group": 2, "skip": True})
    recipe = found.recipe({"slice/0/0:2": "a", "slice/0/2:4": "b"})
    slices = recipe.models["stack"].model.slices
    assert [(Path(s.model).name, s.layers) for s in slices] == [("a", (0, 2)), ("b", (2, 4))]
    (whole,) = found.recipe({"slice/0/0:2": "c", "slice/0/2:4": "c"}).models["stack"].model.slices
    assert whole.layers == (0, 4)
    with pytest.raises(RecipeError, match="no slice is taken"):
        found.recipe({"slice/0/0:2": None, "slice/0/2:4": None})


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"space": {"wieght": [0.0, 1.0]}}, "wieght.*did you mean 'weight'"),
        ({"space": {"lambda": {"low": 0.0, "high": 1.0, "per": "model"}}}, "one value for all models"),
        ({"space": {"weight": {"low": 0.0, "high": 1.0, "per": "layers", "group": 3}}}, "4 blocks.*not divisible"),
        ({"space": {"weight": {"low": 0.0, "high": 1.0, "start": 2.0}}}, "start = 2.0 is outside"),
        ({"members": {"least": 4}}, "least = 4 of 3 models"),
        ({"slices": {"group": 3}, "space": {}}, "not divisible"),
        ({"slices": {"models": ["z"]}, "space": {}}, "unknown model 'z'"),
    ],
)
def test_what_does_not_fit(pantry: Path, more: dict[str, Any], text: str) -> None:
    with pytest.raises((PlanError, RecipeError), match=text):
        space(pantry, **more)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"space": {"weight": [1.0, 0.0]}}, "low 1 should be below high 0"),
        ({"space": {"weight": [0.0, float("inf")]}}, "both finite"),
        ({"space": {"weight": {"low": 0.0, "high": 1.0, "log": True}}}, "above 0"),
        ({"space": {"weight": {"values": [1]}}}, "at least two"),
        ({"space": {"weight": {"per": "model"}}}, "no bounds"),
        ({"space": {"weight": {"low": 0.0, "high": 1.0, "per": "tensor"}}}, "unknown word 'tensor'"),
        ({"score": {"command": "true"}}, "no 'data'"),
        ({"score": {"command": "true", "file": "x.py"}}, "exactly one of"),
        ({"goals": {"x": "up"}}, "'max' or 'min'"),
        ({"weights": {"other": 1}}, "unknown score 'other'"),
        ({"evaluations": 0}, "greater than or equal to 1"),
        ({"halving": {"items": [8, 4]}}, "rising"),
    ],
)
def test_faults_of_the_file(pantry: Path, more: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        SearchFile.model_validate(tree(pantry, **more))


def test_the_two_splits_are_different_files(pantry: Path) -> None:
    (pantry / "copy.txt").write_text("dev")
    for other in ("dev.txt", "copy.txt"):
        data = {"search": str(pantry / "dev.txt"), "report": str(pantry / other)}
        with pytest.raises(RecipeError, match="is the data that is searched by"):
            SearchFile.model_validate(tree(pantry, score={"file": str(pantry / "score.py"), "data": data}))


def test_all_genes_of_a_space_have_names_of_their_own(pantry: Path) -> None:
    spec = {"low": 0.0, "high": 1.0, "per": ["model", "layers", "part"], "parts": {"mlp": "*mlp*"}}
    names = [gene.name for gene in space(pantry, space={"weight": spec}, members={}).genes]
    assert len(names) == len(set(names)) == len(MODELS) * 4 * 2 + 3
