"""`lambda: auto` and `scaling: auto`: how long the merged change comes out, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightsmith
from kit import texts
from weightsmith.core.method import registry
from weightsmith.io.read.folder import FolderSource
from weightsmith.jobs.merge import preview, run
from weightsmith.ops.length import fitted
from weightsmith.recipe.schema import Recipe

ADDED = {"task_arithmetic": "lambda", "ties": "lambda", "magmax": "lambda", "emr": "lambda", "pcb": "lambda",
         "knots": "scaling", "consensus": "lambda"}  # fmt: skip
ALIGNED = {"tsvm": "scaling", "r_tsvm": "scaling", "iso_c": "scaling", "iso_cts": "scaling"}
SHAPE = (24, 16)


def orthogonal(count: int, long: float = 1.0) -> list[Tensor]:
    """Dense task vectors of one length, at right angles."""
    drawn = torch.randn(count, SHAPE[0] * SHAPE[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [(long * row).float().reshape(SHAPE) for row in torch.linalg.qr(drawn.T).Q.T]


def change(deltas: list[Tensor], method: str, **parameters: Any) -> Tensor:
    """The merged task vector of experts around a base of zeros."""
    base = {"w": torch.zeros(SHAPE)}
    merged = weightsmith.merge({f"e{i}": {"w": d} for i, d in enumerate(deltas)}, {method: parameters}, base=base)
    return merged["w"]  # type: ignore[return-value]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_sum_of_equal_and_of_orthogonal_experts(count: int) -> None:
    tau = orthogonal(1)[0]
    torch.testing.assert_close(change([tau] * count, "task_arithmetic", **{"lambda": "auto"}), tau)
    apart = orthogonal(count)
    torch.testing.assert_close(change(apart, "task_arithmetic", **{"lambda": "auto"}), sum(apart) / count**0.5)


@pytest.mark.parametrize("long", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", ADDED)
def test_what_is_added_comes_out_as_long_as_a_mean_expert(method: str, long: float) -> None:
    deltas = [d * share for d, share in zip(orthogonal(4, long), (0.5, 1.0, 1.0, 1.5), strict=True)]
    assert change(deltas, method, **{ADDED[method]: "auto"}).norm().item() == pytest.approx(long, rel=1e-4)


@pytest.mark.parametrize("long", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", ALIGNED)
def test_what_is_made_orthogonal_first_keeps_every_length(method: str, long: float) -> None:
    apart, alike = orthogonal(4, long), orthogonal(1, long) * 4
    assert change(apart, method, scaling="auto").norm().item() == pytest.approx(2 * long, rel=1e-4)
    assert change(alike, method, scaling="auto").norm().item() == pytest.approx(long, rel=1e-4)


@pytest.mark.parametrize("method", [*ADDED, *ALIGNED])
def test_one_expert_has_factor_one(method: str) -> None:
    tau, name = orthogonal(1), (ADDED | ALIGNED)[method]
    found, plain = change(tau, method, **{name: "auto"}), change(tau, method)
    assert found.norm() <= plain.norm() * (1 + 1e-6), "a trimmed expert is not blown up"
    if method not in ("ties", "pcb", "iso_c", "iso_cts", "consensus"):  # which change even a single expert
        torch.testing.assert_close(found, tau[0], rtol=1e-4, atol=1e-6)


def test_what_cancels_is_not_blown_up() -> None:
    tau, other = orthogonal(2)
    found = change([tau, 0.001 * other - tau], "task_arithmetic", **{"lambda": "auto"})
    torch.testing.assert_close(found, 0.002 * other, rtol=1e-3, atol=1e-6)
    assert fitted(0.0, [1.0, 1.0]) == fitted(0.0, [0.0, 0.0], 0.0) == 0.0


def test_the_length_is_that_of_experts_before_filters() -> None:
    deltas = orthogonal(2)
    base = {"w": torch.zeros(SHAPE)}
    models = {f"e{i}": {"w": d} for i, d in enumerate(deltas)}
    for first in ({"magnitude": {"density": 0.2}}, {"dare": {"density": 0.2}}, {"della": {}}):
        found = weightsmith.merge(models, [first, {"task_arithmetic": {"lambda": "auto"}}], base=base)["w"]
        assert found.norm().item() == pytest.approx(1.0, rel=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 9
    for i, delta in enumerate([torch.zeros(SHAPE), *orthogonal(4)]):
        (tmp_path / f"m{i}").mkdir()
        save_file({"w": base + delta, "b": base[0] + delta[0]}, tmp_path / f"m{i}" / "model.safetensors")
        (tmp_path / f"m{i}" / "config.json").write_text("{}")
    return tmp_path


def recipe(folder: Path, method: Any) -> Recipe:
    models = {f"e{i}": str(folder / f"m{i}") for i in range(1, 5)}
    return Recipe.model_validate({"base": str(folder / "m0"), "models": models, "method": method})


def test_runs_and_manifests_say_what_auto_came_to(folder: Path) -> None:
    done = run(recipe(folder, {"task_arithmetic": {"lambda": "auto"}}), folder / "out")
    scales = json.loads((folder / "out/weightsmith.json").read_text())["scales"]["task_arithmetic"]
    assert scales.keys() == {"w", "b"}
    assert scales["w"] == pytest.approx(0.5, rel=1e-4)
    low, high = sorted(f"{scale:.3g}" for scale in scales.values())
    assert f"task_arithmetic: auto came to {low} to {high}, tensor by tensor" in texts(done.warnings)
    planned = texts(preview(recipe(folder, {"task_arithmetic": {"lambda": "auto"}}), folder / "o2").warnings)
    assert [text for text in planned if "auto" in text] == [
        "task_arithmetic: lambda auto will come to about 0.5 to 0.58 (in a sample)"
    ]


SAID = re.compile(
    r"(.+): the merged change (is|will be about) ([\d.]+) times as long as an expert's \(in a sample\); "
    r"(?:try (lambda|scaling) (-?[\d.]+)|put \{scale: \{factor: ([\d.]+)\}\} after it), "
    r"with which it is (?:([\d.]+) times )?as long(?:, or \4 auto)?$"
)
DARE = {"dare": {"density": 0.1}}
LONG = [
    ("task_arithmetic", "lambda"), ({"task_arithmetic": {"lambda": -3}}, "lambda"),
    ([DARE, "task_arithmetic"], "lambda"), ([DARE, {"ties": {"density": 1}}], "lambda"),
    ([DARE, {"ties": {"density": 1, "scope": "tensor"}}, {"scale": {"factor": 2}}], "lambda"),
    ([{"della": {"density": 0.2}}, {"ties": {"density": 1}}], "lambda"),
    (["task_arithmetic", {"consensus": {"lambda": 3}}], "lambda"), ({"doge": {"lambda": 9.0, "iters": 2}}, "lambda"),
    ({"iso_c": {"scaling": 8}}, "scaling"), ({"wudi": {"scaling": 6, "iters": 5}}, "scaling"),
    ({"tsvm": {"scaling": 10}}, "scaling"), ({"tsvm": {"scaling": 0.1}}, "scaling"),
    ({"ties": {"lambda": 0.1}}, "lambda"),
    (["average", {"scale": {"factor": 10}}], ""),
]  # fmt: skip


def length(folder: Path, out: Path) -> float:
    """The length of the merged change over the mean of the experts', of all tensors."""
    base, made, *experts = (
        load_file(f / "model.safetensors") for f in (folder / "m0", out, *(folder / f"m{i}" for i in range(1, 5)))
    )
    long = [float(torch.cat([(one[n] - base[n]).flatten() for n in base]).double().norm()) for one in (made, *experts)]
    return long[0] / (sum(long[1:]) / 4)


def said_of_lengths(problems: Iterable[Any]) -> list[re.Match[str]]:
    return [found for text in texts(problems) if (found := SAID.match(text))]


@pytest.mark.parametrize(("method", "factor"), LONG)
def test_far_lengths_are_said_with_what_to_try(folder: Path, method: Any, factor: str) -> None:
    """The length is that of the result, and with the value to try the next result is as long as was promised."""
    done = run(recipe(folder, method), folder / "out")
    (said,) = said_of_lengths(done.warnings)
    assert float(said[3]) == pytest.approx(length(folder, folder / "out"), rel=0.07)
    (planned,) = said_of_lengths(preview(recipe(folder, method), folder / "x").warnings)
    assert float(planned[3]) == pytest.approx(float(said[3]), rel=0.25)  # a sample of a small model is all of it
    assert said[4] == (factor or None)
    stages = method if isinstance(method, list) else [method]
    if factor:
        owner = max(i for i, stage in enumerate(stages) if factor in _named(stage))
        name, own = next(iter(stages[owner].items())) if isinstance(stages[owner], dict) else (stages[owner], {})
        stages = [*stages[:owner], {name: {**own, factor: float(said[5])}}, *stages[owner + 1 :]]
    else:
        stages = [*stages, {"scale": {"factor": float(said[6])}}]
    again = run(recipe(folder, stages), folder / "again")
    assert not said_of_lengths(again.warnings)
    assert length(folder, folder / "again") == pytest.approx(float(said[7] or 1), rel=0.06)


def _named(stage: Any) -> set[str]:
    """What the parameters of a stage are called."""
    return {one.name for one in registry(stage if isinstance(stage, str) else next(iter(stage))).parameters()}


@pytest.mark.parametrize("method", [{"task_arithmetic": {"lambda": 0.7}}, "linear", "ties", "tsvm", "model_stock"])
def test_usual_lengths_are_in_the_plan_and_not_warned_of(folder: Path, method: Any) -> None:
    plan = preview(recipe(folder, method), folder / "out")
    assert not said_of_lengths(plan.warnings)
    (times,) = re.findall(
        r"^the merged change about ([\d.]+) times an expert's \(in a sample\)$", plan.result["length"]
    )
    run(recipe(folder, method), folder / "out")
    assert float(times) == pytest.approx(length(folder, folder / "out"), rel=0.25)
    noted = json.loads((folder / "out/weightsmith.json").read_text())["lengths"]
    assert max(noted.values()) == pytest.approx(length(folder, folder / "out"), rel=0.07)


def test_lengths_of_a_coarser_output_are_those_before_rounding(folder: Path) -> None:
    made = recipe(folder, {"task_arithmetic": {"lambda": 0.1}}).model_dump(exclude_defaults=True)
    run(Recipe.model_validate({**made, "output": {"dtype": "bfloat16"}}), folder / "out")
    noted = json.loads((folder / "out/weightsmith.json").read_text())["lengths"]["task_arithmetic"]
    assert noted == pytest.approx(0.2, abs=0.05)


def test_compressed_folders_and_single_experts_have_no_length(folder: Path) -> None:
    alone = Recipe.model_validate({"base": str(folder / "m0"), "models": {"e": str(folder / "m1")}, "method": "ties"})
    assert "length" not in preview(alone, folder / "out").result
    assert "lengths" not in json.loads((run(alone, folder / "out").out / "weightsmith.json").read_text())


def test_a_plan_reads_nothing_from_afar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderSource, "quick", lambda self, name: False)
    assert "length" not in preview(recipe(folder, "ties"), folder / "out").result
