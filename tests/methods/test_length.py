"""`lambda: auto` and `scaling: auto`: how long the merged change comes out, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightsmith
from kit import texts
from weightsmith.jobs.merge import preview, run
from weightsmith.ops.length import fitted
from weightsmith.recipe.schema import Recipe

ADDED = {"task_arithmetic": "lambda", "ties": "lambda", "magmax": "lambda", "emr": "lambda", "pcb": "lambda",
         "knots": "scaling"}  # fmt: skip
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
    if method not in ("ties", "pcb", "iso_c", "iso_cts"):  # which change even a single expert
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
        "task_arithmetic: lambda auto will come to about 0.5 (in a sample)"
    ]


@pytest.mark.parametrize(("method", "times", "better"), [
    ("task_arithmetic", "2", "0.5"),
    ({"task_arithmetic": {"lambda": -3}}, "6", "0.5"),
    ([{"dare": {"density": 0.25}}, "task_arithmetic"], "4", "0.25"),
])  # fmt: skip
def test_long_sums_are_said_with_what_to_try(folder: Path, method: Any, times: str, better: str) -> None:
    said = (
        f"task_arithmetic: the merged change will be about {times} times as long as an expert's (in a sample); "
        f"try lambda {better}, with which it is as long, or lambda auto"
    )
    assert said in texts(preview(recipe(folder, method), folder / "out").warnings)
    assert said in texts(run(recipe(folder, method), folder / "out").warnings)


@pytest.mark.parametrize("method", [{"task_arithmetic": {"lambda": 0.7}}, "linear", "ties", {"tsvm": {"scaling": 10}}])
def test_other_sums_are_not_talked_about(folder: Path, method: Any) -> None:
    """tsvm: vectors are summed by task_arithmetic, but its matrices are not, and it has no lambda."""
    assert not [text for text in texts(preview(recipe(folder, method), folder / "out").warnings) if "as long" in text]
