"""Planning: rules, exclusions, extra tensors, statistics' notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.engine.carry import carry_out
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.plan.plan import make_plan
from weightsmith.plan.room import PYTHON, TORCH
from weightsmith.recipe.resolve import ramp
from weightsmith.recipe.schema import Recipe

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), "lm_head.weight"]


def model(value: float, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.full((4, 3), float(value)) for name in NAMES} | {
        k.replace("__", "."): v for k, v in more.items()
    }


def merge(recipe: dict[str, Any], **models: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    base = models.pop("base", None)
    sources = Inputs(
        None if base is None else MemorySource(base, "base"), {n: MemorySource(t, n) for n, t in models.items()}
    )
    whole = {"models": {n: {"model": n} for n in models}, **({"base": "base"} if base else {}), **recipe}
    sink = MemorySink()
    carry_out(make_plan(Recipe.model_validate(whole), sources=sources, threads=1), sources, sink)
    return sink.tensors()


def test_integers_are_compared_whatever_the_reason_is_called() -> None:
    sources = Inputs(None, {n: MemorySource({"steps": torch.tensor([i])}, n) for i, n in enumerate("ab")})
    plan = make_plan(Recipe.model_validate({"models": {"a": "a", "b": "b"}, "method": "linear"}), sources=sources)
    renamed = replace(plan, tasks=tuple(replace(task, reason="in other words") for task in plan.tasks))
    with pytest.raises(PlanError, match=r"steps \(int64\) differs between a and b and cannot be averaged"):
        carry_out(renamed, sources, MemorySink())


def firsts(merged: dict[str, torch.Tensor]) -> list[float]:
    return [round(float(merged[n].flatten()[0]), 4) for n in NAMES]


def test_ramp_over_depth() -> None:
    merged = merge(
        {"method": "linear", "parameters": {"weight": {"a": [0.0, 1.0], "b": [1.0, 0.0]}}}, a=model(0), b=model(1)
    )
    assert firsts(merged) == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [ramp([0, 1, 0], d) for d in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]


def test_first_rule_wins_and_the_rest_falls_through() -> None:
    rules = [
        {"match": "lm_head.weight", "method": "keep"},
        {"role": "embed", "parameters": {"lambda": 0.0}},
        {"layers": [1, 3], "parameters": {"weight": {"a": 0.25}}},
        {"match": "*", "parameters": {"lambda": 0.5}},
    ]
    merged = merge({"method": "task_arithmetic", "rules": rules}, base=model(0), a=model(1), b=model(1))
    assert firsts(merged) == [0.0, 1.0, 1.25, 1.25, 0.0]


def test_a_models_own_parameters() -> None:
    recipe = {"method": "task_arithmetic", "parameters": {"weight": 0.5}}
    recipe["models"] = {"a": {"model": "a", "weight": 0.125}, "b": "b"}
    assert firsts(merge(recipe, base=model(0), a=model(1), b=model(1))) == [0.625] * 5


def test_inline_parameters_stay_with_their_stage() -> None:
    recipe = {"method": [{"dare": {"density": 1.0}}, "ties"], "parameters": {"density": 0.5, "scope": "tensor"}}
    merged = merge(recipe, base=model(0), a=model(1))
    assert int((merged[NAMES[0]] != 0).sum()) == 6


def test_an_ambiguous_parameter_is_refused() -> None:
    with pytest.raises(RecipeError, match="'density' belongs to dare and ties; write it inside the stage"):
        merge({"method": ["dare", "ties"], "parameters": {"density": 0.5}}, base=model(0), a=model(1))


def test_excluded_tensors_may_be_missing_or_of_another_shape() -> None:
    a = model(1)
    del a["lm_head.weight"]
    b = model(1, model__embed_tokens__weight=torch.ones(9, 3))
    recipe = {"method": "task_arithmetic", "exclude": ["lm_head.weight", "*embed*"], "parameters": {"lambda": 0.5}}
    assert firsts(merge(recipe, base=model(0), a=a, b=b)) == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_an_extra_tensor_is_refused_or_carried_over() -> None:
    a = model(1, mtp__weight=torch.full((2,), 7.0))
    with pytest.raises(PlanError, match=r'mtp.weight is in a but not in base; to carry it over .* "exclude"'):
        merge({"method": "task_arithmetic"}, base=model(0), a=a, b=model(1))
    merged = merge({"method": "task_arithmetic", "exclude": ["mtp.*"]}, base=model(0), a=a, b=model(1))
    assert merged["mtp.weight"].tolist() == [7.0, 7.0]


def test_integers_are_copied_if_equal_and_refused_if_not() -> None:
    same = merge({"method": "linear"}, a=model(0, ids=torch.arange(3)), b=model(1, ids=torch.arange(3)))
    assert same["ids"].tolist() == [0, 1, 2]
    with pytest.raises(PlanError, match=r"ids \(int64\) differs between a and b"):
        merge({"method": "linear"}, a=model(0, ids=torch.arange(3)), b=model(1, ids=torch.arange(1, 4)))


def test_tied_tensors_are_written_once() -> None:
    tied = torch.ones(4, 3)
    a, b = model(0), model(2)
    a["lm_head.weight"] = a["model.embed_tokens.weight"] = tied
    b["lm_head.weight"] = b["model.embed_tokens.weight"] = tied * 3
    plan = make_plan(
        Recipe.model_validate({"models": {"a": "a", "b": "b"}, "method": "linear"}),
        sources=Inputs(None, {"a": MemorySource(a, "a"), "b": MemorySource(b, "b")}),
    )
    assert [key.name for key in plan.keys if key.role in ("embed", "head")] == ["model.embed_tokens.weight"]


def test_grams_say_which_layers_are_stored_transposed() -> None:
    from weightsmith.core.method import registry

    stage = registry("regmean")()
    key = MemorySource(model(0)).keys[NAMES[1]]
    assert not stage.transposed  # type: ignore[attr-defined]
    assert stage.informed(key, {"gram": {"transposed": [NAMES[1]]}}).transposed  # type: ignore[attr-defined]


def test_a_statistic_that_lacks_one_tensor_falls_back_there_only() -> None:
    sources = Inputs(
        None,
        {n: MemorySource(model(i), n) for i, n in enumerate("ab")},
        {"gram": {n: MemorySource({k: torch.eye(3) for k in NAMES[1:3]}, "gram") for n in "ab"}},
    )
    plan = make_plan(Recipe.model_validate({"models": {"a": "a", "b": "b"}, "method": "regmean"}), sources=sources)
    assert [t.pipeline.name for t in plan.tasks if t.pipeline] == ["linear", "regmean", "regmean", "linear", "linear"]


def test_memory_is_obeyed_or_refused() -> None:
    recipe = Recipe.model_validate({"base": "base", "models": {"a": "a"}, "method": "tsvm"})
    sources = Inputs(
        MemorySource({"w": torch.zeros(3000, 3000)}, "base"), {"a": MemorySource({"w": torch.zeros(3000, 3000)})}
    )
    with pytest.raises(PlanError, match=r"--memory 10 MB is too little: w alone needs"):
        make_plan(recipe, sources=sources, memory=10_000_000)
    assert make_plan(recipe, sources=sources, memory=10_000_000_000, threads=2).threads >= 1


def test_depth_needs_blocks() -> None:
    flat = {"w": torch.ones(3, 3)}
    with pytest.raises(PlanError, match="lines: works by depth, but no tensor's name holds a block number"):
        merge({"method": ["task_arithmetic", "lines"]}, base=flat, a={"w": torch.zeros(3, 3)})


def test_a_ramp_without_blocks_is_said() -> None:
    method = {"task_arithmetic": {"lambda": [0, 1]}}
    recipe = Recipe.model_validate({"base": "base", "models": {"a": "a"}, "method": method})
    said = "a list of numbers goes from the first block to the last, and no tensor's name holds a block number"
    for name, told in (("stage_0.w", True), ("layers.0.w", False)):
        state = {name: torch.ones(3, 3)}
        plan = make_plan(recipe, sources=Inputs(MemorySource(state, "base"), {"a": MemorySource(state, "a")}))
        assert any(said in str(one) for one in plan.warnings) == told


@pytest.mark.parametrize("method", ["ties", "slerp", "breadcrumbs", "linear", "tsvm"])
def test_empty_tensors_are_copied(method: str) -> None:
    empty = torch.zeros(0, 3)
    merged = merge({"method": method}, base=model(0, none=empty), a=model(1, none=empty.clone()))
    assert merged["none"].shape == (0, 3)


def test_small_adapters_take_little_memory_beside_the_process(tmp_path: Path) -> None:
    """What allocators hold beside what is in use is of large tensors only."""
    base = MemorySource({"layers.0.q_proj.weight": torch.ones(16, 16)}, "base")
    pair = {part: torch.ones(shape) for part, shape in (("lora_A", (2, 16)), ("lora_B", (16, 2)))}
    (tmp_path / "a").mkdir()
    save_file(
        {f"base_model.model.layers.0.q_proj.{part}.weight": tensor for part, tensor in pair.items()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    recipe = Recipe.model_validate({"base": "base", "models": {"a": "a", "b": "b"}, "method": "task_arithmetic"})
    adapters = {name: AdapterSource(tmp_path / "a", base) for name in ("a", "b")}
    plan = make_plan(recipe, sources=Inputs(base, adapters), threads=2)
    assert PYTHON + TORCH < plan.peak_bytes < 1.02 * (PYTHON + TORCH)
