"""mergekit-evolve's files: known genotypes, and whole runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.pantry import stocked
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.search.api import search
from weightsmith.search.evolve import EvolveSpace, Genome
from weightsmith.search.run import prepared
from weightsmith.search.schema import SearchFile, load


@pytest.fixture
def pantry(tmp_path: Path) -> Path:
    return stocked(tmp_path)


def space(pantry: Path, method: str = "dare_ties", **more: Any) -> EvolveSpace:
    based = {"base_model": str(pantry / "base")} if method in ("ties", "dare_ties", "task_arithmetic") else {}
    models = [str(pantry / n) for n in "abc"]
    genome = Genome.model_validate({"models": models, "merge_method": method, **based, **more})
    return EvolveSpace(genome, models, based.get("base_model"), 4)


def test_sizes_and_cuts_of_genes(pantry: Path) -> None:
    found = space(pantry)
    assert [g.name for g in found.genes[:4]] == [
        "weight/0/0/rest", "density/0/0/rest", "weight/0/1/rest", "density/0/1/rest"
    ]  # fmt: skip
    assert [g.begin for g in found.genes[:2]] == [pytest.approx(1 / 3), 1.0]
    point = {g.name: v for g, v in zip(found.genes, (-0.5, -1.5, 0.25, 0.4, 2.0, 0.1), strict=True)}
    recipe = found.recipe(point)
    assert [ref.parameters for ref in recipe.models.values()] == [
        {"weight": 0.5, "density": 1.0}, {"weight": 0.25, "density": 0.4}, {"weight": 2.0, "density": 0.1}
    ]  # fmt: skip
    assert [stage.name for stage in recipe.method] == ["dare", "ties"]
    assert recipe.output.dtype == "bfloat16"


def test_negative_weights_where_they_are_allowed(pantry: Path) -> None:
    found = space(pantry, "linear", allow_negative_weights=True, normalize=False)
    recipe = found.recipe({g.name: v for g, v in zip(found.genes, (-0.5, 0.25, 2.0), strict=True)})
    assert [ref.parameters["weight"] for ref in recipe.models.values()] == [-0.5, 0.25, 2.0]
    assert recipe.parameters["normalize"] is False


def test_groups_and_filters(pantry: Path) -> None:
    found = space(pantry, "ties", layer_granularity=2, filters=["mlp"])
    assert len(found.genes) == 2 * 3 * 2 * 2
    point = {g.name: (i + 1) / 100 for i, g in enumerate(found.genes)}
    weight = next(iter(found.recipe(point).models.values())).parameters["weight"]
    mlp = [point["weight/0/0/mlp"], point["weight/1/0/mlp"]]
    rest = [point["weight/0/0/rest"], point["weight/1/0/rest"]]
    assert weight == [
        {"match": "*mlp*", "layers": [0, 2], "value": mlp[0]},
        {"match": "*mlp*", "layers": [2, 4], "value": mlp[1]},
        {"match": "*mlp*", "role": "embed", "layers": "outside", "value": mlp[0]},
        {"match": "*mlp*", "layers": "outside", "value": mlp[1]},
        {"layers": [0, 2], "value": rest[0]},
        {"layers": [2, 4], "value": rest[1]},
        {"role": "embed", "layers": "outside", "value": rest[0]},
        {"layers": "outside", "value": rest[1]},
    ]


def test_smooth_genes_are_a_ramp(pantry: Path) -> None:
    found = space(pantry, "linear", layer_granularity=2, smooth=True)
    point = {g.name: (i + 1) / 10 for i, g in enumerate(found.genes)}
    first = next(iter(found.recipe(point).models.values()))
    low, high = point["weight/0/0/rest"], point["weight/1/0/rest"]
    assert first.parameters["weight"] == [{"layers": "outside", "value": low}, [low, high]]  # as its gradients are read


def test_slerp_takes_the_two_largest(pantry: Path) -> None:
    found = space(pantry, "slerp")
    config = found.config({g.name: v for g, v in zip(found.genes, (0.1, -0.9, 0.4), strict=True)})
    assert [Path(m["model"]).name for m in config["models"]] == ["b", "c"]
    assert config["parameters"]["t"] == pytest.approx(math.exp(0.4) / (math.exp(0.4) + math.exp(0.9)))
    by_group = space(pantry, "slerp", layer_granularity=2)
    values = (0.9, 0.5, 0.1, 0.1, 0.5, 0.9)
    config = by_group.config({g.name: v for g, v in zip(by_group.genes, values, strict=True)})
    pairs = [[Path(s["model"]).name for s in part["sources"]] for part in config["slices"]]
    assert pairs == [["a", "b"], ["c", "b"]]
    by_group.recipe({g.name: v for g, v in zip(by_group.genes, values, strict=True)})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"merge_method": "ties", "base_model": None}, "needs a base_model"),
        ({"merge_method": "slerp", "filters": ["mlp"]}, "neither filters nor smooth"),
        ({"merge_method": "linear", "smooth": True}, "layer_granularity"),
        ({"merge_method": "lienar"}, "did you mean 'linear'"),
    ],
)
def test_faults(pantry: Path, given: dict[str, Any], text: str) -> None:
    tree = {"genome": {"models": [str(pantry / n) for n in "abc"], **given}, "tasks": [{"name": "t", "report": "u"}]}
    with pytest.raises(RecipeError, match=text):
        SearchFile.model_validate(tree)


def test_layers_have_to_come_out_even(pantry: Path) -> None:
    with pytest.raises(PlanError, match="granularity 3 does not divide the 4 layers"):
        space(pantry, layer_granularity=3)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_a_file_runs_as_it_is(pantry: Path, tmp_path: Path, method: str) -> None:
    """Tasks are those of lm-evaluation-harness; here a function scores in their place."""
    genome = {"models": ["a", "b", "c"], "merge_method": method, "layer_granularity": 2, "filters": ["mlp"]}
    if method == "slerp":
        del genome["filters"]
    if method in ("ties", "dare_ties", "task_arithmetic"):
        genome["base_model"] = "base"
    score = {"file": "score.py", "data": {"search": "dev.txt", "report": "test.txt"}}
    tree = {"genome": genome, "tasks": [{"name": "near", "weight": 1.0}], "score": score, "evaluations": 8}
    (pantry / "evolve.yaml").write_text(yaml.safe_dump({**tree, "rescore": 0, "controls": False}))
    made = search(load(pantry / "evolve.yaml"), tmp_path / "out")
    assert not any(trial.failed for trial in made.search.trials)
    assert made.search.sampler.name == "cmaes"


def test_its_tasks_need_others_to_report_on(pantry: Path) -> None:
    genome = {"models": [str(pantry / n) for n in "ab"], "merge_method": "linear"}
    tasks = [{"name": "gsm", "weight": 1.0}, {"name": "toxic", "weight": -0.5, "metric": "acc_norm,none"}]
    with pytest.raises(RecipeError, match="is the data that is searched by"):
        SearchFile.model_validate({"genome": genome, "tasks": tasks})
    tasks = [{**task, "report": f"{task['name']}_test"} for task in tasks]
    for key in ("shuffle", "apply_chat_template"):  # scores would be others
        assert SearchFile.model_validate({"genome": genome, "tasks": tasks, key: False})
        with pytest.raises(RecipeError, match=f"unknown key '{key}'"):
            SearchFile.model_validate({"genome": genome, "tasks": tasks, key: True})
    file = SearchFile.model_validate({"genome": genome, "tasks": tasks, "limit": 10, "num_fewshot": 2})
    assert file.weights == {"gsm": 1.0, "toxic": -0.5}
    asked = file.score.lm_eval
    assert asked is not None
    assert (asked.limit, asked.shots) == (10, 2)
    assert asked.metric == {"gsm": "acc,none", "toxic": "acc_norm,none"}
    with pytest.raises(RecipeError, match="has no lm_eval"):
        prepared(file.model_copy(update={"score": file.score.model_copy(
            update={"lm_eval": asked.model_copy(update={"python": "/bin/false"})})}), pantry / "out")  # fmt: skip
