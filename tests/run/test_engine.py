"""From files, nested recipes, dtypes of the output, and groups; tests/test_matrix.py has the law of equal bytes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

import weightsmith
from goldens import tiny_llama
from kit import same_bits
from run.small_inputs import small_inputs
from weightsmith.core.method import Grain, registered
from weightsmith.engine.carry import carry_out
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.nested import RecipeSource
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return small_inputs()


def recipe(*stages: Any, count: int = 3, **more: Any) -> Recipe:
    return Recipe(
        base=ModelRef(model="base"),
        models={f"e{i}": ModelRef(model=f"e{i}") for i in range(count)},
        method=tuple(StageSpec.model_validate(s) for s in stages),
        **more,
    )


def only(inputs: Inputs, count: int) -> Inputs:
    kept = [f"e{i}" for i in range(count)]
    return replace(inputs, experts={n: inputs.experts[n] for n in kept},
                   stats={s: {n: by[n] for n in kept} for s, by in inputs.stats.items()})  # fmt: skip


def merged(wanted: Recipe, inputs: Inputs, **how: Any) -> dict[str, torch.Tensor]:
    sink = MemorySink()
    carry_out(make_plan(wanted, sources=inputs, threads=how.pop("threads", 1)), inputs, sink, **how)
    return sink.tensors()


def test_nested_recipe_equals_two_stages(inputs: Inputs) -> None:
    inner = recipe("ties", count=2)
    first = merged(inner, only(inputs, 2))
    outer = Recipe(base=ModelRef(model="base"), models={"n": ModelRef(model=inner), "e2": ModelRef(model="e2")},
                   method=(StageSpec(name="task_arithmetic"),), parameters={"lambda": 0.4})  # fmt: skip
    nested = Inputs(inputs.base, {"n": RecipeSource(inner, only(inputs, 2)), "e2": inputs.experts["e2"]})
    staged = Inputs(inputs.base, {"n": MemorySource(first, "n"), "e2": inputs.experts["e2"]})
    assert same_bits(merged(outer, nested), merged(outer, staged))
    again = pickle.loads(pickle.dumps(nested.experts["n"]))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(again.read(name, 3, 7), first[name][3:7])


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "float64"])
def test_output_dtype(dtype: str, inputs: Inputs) -> None:
    out = merged(recipe("linear", output={"dtype": dtype}), inputs)
    exact = merged(recipe("linear", output={"dtype": "float32"}), inputs)
    assert {str(t.dtype) for t in out.values()} == {f"torch.{dtype}"}
    for name, tensor in out.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype))


def test_gradients_flow_through_a_method() -> None:
    from weightsmith.core.keys import Key
    from weightsmith.core.site import Site

    weight = torch.tensor(0.3, requires_grad=True)
    site = Site(Key("w", (4,), "float32"), torch.randn(1, 4) * weight, torch.zeros(4))
    weightsmith.TaskArithmetic().merge(site).sum().backward()
    assert weight.grad is not None


def test_group_grain_keeps_the_function(inputs: Inputs) -> None:
    """Permuting an expert's hidden units changes nothing: weight matching undoes it exactly."""
    from weightsmith.core.symmetry import groups, permute

    expert = {k: inputs.experts["e0"].read(k).float() for k in inputs.base.keys}
    shuffled = dict(expert)
    found = groups(MemorySource(expert).keys.values())
    assert [g.size for g in found] == [tiny_llama.MLP] * tiny_llama.LAYERS
    generator = torch.Generator().manual_seed(1)
    for group in found:
        shuffled |= permute(shuffled, group, torch.randperm(group.size, generator=generator))
    name = "model.layers.0.mlp"
    x = torch.randn(5, tiny_llama.HIDDEN)

    def mlp(w: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = torch.nn.functional.silu(x @ w[f"{name}.gate_proj.weight"].T) * (x @ w[f"{name}.up_proj.weight"].T)
        return hidden @ w[f"{name}.down_proj.weight"].T

    assert not torch.equal(shuffled[f"{name}.up_proj.weight"], expert[f"{name}.up_proj.weight"])
    assert torch.allclose(mlp(expert), mlp(shuffled), atol=1e-5)
    back = weightsmith.merge({"shuffled": shuffled}, "weight_matching", base=expert)
    assert all(torch.equal(back[n], expert[n]) for n in expert)


def test_group_grain_in_the_registry() -> None:
    assert any(cls.grain is Grain.GROUP for cls in registered().values())
