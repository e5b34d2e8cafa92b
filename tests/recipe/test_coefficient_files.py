"""Values of a parameter from a file of coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from kit import noise
from weightsmith.core.errors import RecipeError
from weightsmith.core.parameter import Vector
from weightsmith.recipe.load import loads
from weightsmith.recipe.table import write_table

BASE = {"layers.0.a": noise(5, 3, seed=1), "layers.1.b": noise(4, seed=2)}
EXPERTS = {m: {n: t + noise(*t.shape, seed=s) for n, t in BASE.items()} for m, s in (("x", 5), ("y", 6))}
TAU = {m: {n: t - BASE[n] for n, t in state.items()} for m, state in EXPERTS.items()}


def saved(
    folder: Path, parameter: str, rows: dict[str, Tensor], models: tuple[str, ...] = ("x", "y")
) -> dict[str, Any]:
    write_table(folder / "c.safetensors", models, {parameter: rows})
    return {"file": str(folder / "c.safetensors")}


def test_each_tensor_and_model_has_its_number_and_others_the_default(tmp_path: Path):
    value = saved(tmp_path, "weight", {"layers.0.a": torch.tensor([0.5, -1.0])})
    merged = ws.merge(EXPERTS, "task_arithmetic", BASE, weight=value)
    torch.testing.assert_close(
        merged["layers.0.a"], BASE["layers.0.a"] + 0.5 * TAU["x"]["layers.0.a"] - TAU["y"]["layers.0.a"]
    )
    torch.testing.assert_close(
        merged["layers.1.b"], BASE["layers.1.b"] + TAU["x"]["layers.1.b"] + TAU["y"]["layers.1.b"]
    )


def test_one_number_for_all_models(tmp_path: Path):
    value = saved(tmp_path, "lambda", {n: torch.tensor([0.25]) for n in BASE})
    merged = ws.merge(EXPERTS, "task_arithmetic", BASE, lambda_=value)
    plain = ws.merge(EXPERTS, "task_arithmetic", BASE, lambda_=0.25)
    assert all(torch.equal(merged[n], plain[n]) for n in BASE)


def parts(flat: Tensor, factors: Tensor) -> Tensor:
    return torch.cat([piece * f for piece, f in zip(torch.chunk(flat, len(factors)), factors, strict=False)])


@pytest.mark.parametrize("count", [1, 2, 4, 15, 20])
def test_chunks_are_cut_as_torch_chunk_does(tmp_path: Path, count: int):
    """4 pieces of 15 entries are of 4, 4, 4, 3; of 20 factors for 15 entries the last are not used."""
    factors = noise(2, count, seed=9)
    value = saved(tmp_path, "factor", {"layers.0.a": factors})
    merged = ws.merge(EXPERTS, [{"scale": {"factor": value}}, "task_arithmetic"], BASE)
    want = sum(parts(TAU[m]["layers.0.a"].flatten(), factors[i]) for i, m in enumerate(EXPERTS))
    torch.testing.assert_close(merged["layers.0.a"], BASE["layers.0.a"] + want.reshape(5, 3))


def test_equal_factors_of_groups_are_one_factor_and_groups_differ_by_tensor():
    from methods.driver import run, sites

    scale = ws.Scale(factor=Vector(torch.tensor([0.0, 1.0])), by="group")  # type: ignore[attr-defined]
    base = {"a": torch.zeros(40, 50), "b": torch.zeros(40, 50)}
    ones = {n: torch.ones(40, 50) for n in base}
    masks = run(scale | ws.TaskArithmetic(), sites({"x": ones}, base, seed=3))  # type: ignore[attr-defined]
    assert set(masks["a"].unique().tolist()) == {0.0, 1.0}
    assert 0.4 < float(masks["a"].mean()) < 0.6
    assert not torch.equal(masks["a"], masks["b"])
    other = ws.Scale(factor=Vector(torch.tensor([1.0, 0.0])), by="group")  # type: ignore[attr-defined]
    rest = run(other | ws.TaskArithmetic(), sites({"x": ones}, base, seed=3))  # type: ignore[attr-defined]
    assert torch.equal(masks["a"] + rest["a"], torch.ones(40, 50))


@pytest.mark.parametrize("count", [1, 3, 15])
@pytest.mark.parametrize("by", ["chunk", "group"])
def test_a_vector_has_a_gradient(count: int, by: str):
    factor = (1 + noise(count, seed=4)).requires_grad_()
    direction = {n: noise(*t.shape, seed=20 + i) for i, (n, t) in enumerate(BASE.items())}
    scale = ws.Scale(factor=Vector(factor), by=by)  # type: ignore[attr-defined]
    table = ws.merge(EXPERTS, scale | ws.TaskArithmetic(), BASE, rules=[{"match": "*b", "method": "keep"}])  # type: ignore[attr-defined]
    (table["layers.0.a"] * direction["layers.0.a"]).sum().backward()
    assert factor.grad is not None
    for i in range(count):
        unit = Vector(torch.eye(count)[i])
        one = ws.merge(EXPERTS, ws.Scale(factor=unit, by=by) | ws.TaskArithmetic(), BASE)  # type: ignore[attr-defined]
        want = ((one["layers.0.a"] - BASE["layers.0.a"]) * direction["layers.0.a"]).sum()
        torch.testing.assert_close(factor.grad[i], want, rtol=1e-4, atol=1e-5)


RECIPE = """\
base: base
models: {x: a, y: b}
method: task_arithmetic
parameters:
  weight: {file: %s}
"""


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("gone.safetensors", r"r:5:\d+: .*weight: gone\.safetensors: no such file of coefficients"),
        ("text.safetensors", r"r:5:\d+: .*weight: .*text\.safetensors: not a file of coefficients"),
        ("c.safetensors", r"r:5:\d+: .*c\.safetensors holds no coefficients of this parameter"),
        ("changed.safetensors, sha256: abc", r"r:5:\d+: .*was changed since the recipe was written"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, file: str, text: str):
    (tmp_path / "text.safetensors").write_text("no")
    saved(tmp_path, "lambda", {"a": torch.ones(1)})
    (tmp_path / "changed.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes())
    with pytest.raises(RecipeError, match=text):
        loads(RECIPE % file, "r", folder=tmp_path)


def test_a_file_of_other_models_is_refused(tmp_path: Path):
    value = saved(tmp_path, "weight", {n: torch.ones(2) for n in BASE}, ("p", "q"))
    with pytest.raises(ws.PlanError, match=r"no coefficients of x; it has those of p, q"):
        ws.merge(EXPERTS, "task_arithmetic", BASE, weight=value)


def test_a_recipe_says_which_file_it_means(tmp_path: Path):
    saved(tmp_path, "weight", {n: torch.ones(2) for n in BASE})
    recipe = loads(RECIPE % "c.safetensors", "r", folder=tmp_path)
    assert recipe.parameters["weight"]["file"] == str(tmp_path / "c.safetensors")
    assert len(recipe.parameters["weight"]["sha256"]) == 64
