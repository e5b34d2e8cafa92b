"""The gradient pass, for every registered method and filter: found by itself, there is no list to add to.

What has no derivative is listed in `WITHOUT` with the reason; a new parameter must be declared `smooth` or stand there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightsmith as ws
from kit import count_for, noise, same_bits
from methods.driver import run, sites
from test_conformance import STAGES, Peak, models, pipeline, statistics, variants
from weightsmith.core.errors import NumericError, PlanError, RecipeError
from weightsmith.core.method import BASE, Parameter, Stage, registered, registry
from weightsmith.core.parameter import Traced, opened
from weightsmith.core.task import Way
from weightsmith.engine import gradient
from weightsmith.engine.gradient import Pullback, pull
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

WITHOUT = {
    "agree": {"density": "ranks"},
    "breadcrumbs": {"density": "ranks", "remove_top": "ranks"},
    "dare": {"density": "random masks"},
    "della": {"density": "random masks", "epsilon": "random masks"},
    "magnitude": {"density": "ranks"},
    "ties": {"density": "ranks"},
    "sce": {"select_topk": "ranks", "equal_below": "a threshold"},
    "soup": {"score": "ranks"},
    "widen": {"above_average_value_ratio": "ranks", "score_calibration_value": "ranks"},
    "knots": {"density": "ranks", "drop": "random masks"},
    "pcb": {"ratio": "ranks", "clip": "ranks"},
    "consensus": {"tall_mask_lambda": "a threshold"},
    "ram": {"epsilon": "a threshold"},
    "ramplus_tl": {"epsilon": "a threshold"},
    "fisher": {"floor": "a threshold"},
    "iso_c": {"rank_tol": "a rank"},
    "iso_cts": {"common_space_fraction": "a rank"},
    "tsvm": {"rank_fraction": "a rank"},
    "r_tsvm": {"outlier_sigma": "a threshold", "sparsity_eps": "a threshold", "rank_base": "a rank",
               "rank_gamma": "a rank", "weight_cap": "a threshold"},
    "aswudi": {"share": "a rank", "time": "of a filter", "min_eigenvalue": "a threshold"},
    "swudi": {"time": "of a filter", "rank_ratio": "a rank", "min_eigenvalue": "a threshold"},
    "doge": {"lambda": "a solver", "density": "ranks", "lr": "a solver"},
    "wudi": {"lr": "a solver"},
    "optmerge": {"lr": "a solver", "momentum": "a solver"},
    "opcm": {"alpha": "a rank", "lambda": "a running norm"},
    "karcher": {"tol": "a solver that stops by its data", "weight": "a solver that stops by its data"},
    "multislerp": {"eps": "a threshold"},
    "mwa": {"value": "from logs", "penalty": "from logs"},
    "weight_matching": {"weight": "an assignment"},
    "ffg": {"density": "ranks", "threshold": "a threshold"},
    "codiemb": {"power": "of measured lengths"},
    "ota": {"power": "of statistics", "epsilon": "a threshold"},
    "fwsvd": {"ratio": "a codec", "floor": "a codec"},
    "losparse": {"ratio": "a codec", "rows": "a codec"},
    "mbat": {"k": "a codec"},
    "tall_masks": {"lambda": "a codec"},
    "tsvc": {"rank_fraction": "a codec"},
    "twin": {"density": "a codec"},
}  # fmt: skip


STEP = 2**-12


def numbers(cls: type[Stage]) -> list[Parameter]:
    return [p for p in cls.parameters() if p.kind == "number"]


def test_what_has_no_derivative_is_listed():
    found = {n: [p.name for p in numbers(cls) if not p.smooth] for n, cls in registered().items()}
    assert {n: names for n, names in found.items() if names} == {n: list(WITHOUT[n]) for n in sorted(WITHOUT)}


@pytest.mark.parametrize(("method", "name"), [(m, n) for m, names in WITHOUT.items() for n in names])
def test_what_has_no_derivative_is_refused_by_name(method: str, name: str):
    cls = registry(method)
    field = next(p for p in cls.parameters() if p.name == name)
    default = field.default if isinstance(field.default, float) else 2.0 if field.check(0.5) else 0.5
    text = re.escape(f"{method}: {name} is a tensor that requires grad, but the merge has no derivative")
    with pytest.raises(RecipeError, match=text):
        cls(**{field.field: torch.tensor(default, requires_grad=True)})


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ([ws.TaskArithmetic(weight=torch.tensor(0.5, requires_grad=True), lambda_="auto")], "task_arithmetic"),
        ([ws.Scale(factor=torch.tensor(0.5, requires_grad=True)), ws.Breadcrumbs(rescale=True), "task_arithmetic"],
         "breadcrumbs"),
        ([ws.TaskArithmetic(weight=torch.tensor(0.5, requires_grad=True)), ws.Lines()], "lines"),
    ],
)  # fmt: skip
def test_what_is_measured_of_a_tensor_is_refused(method: Any, name: str):
    """Its derivative would silently lack a part."""
    base, experts = models(2)
    text = f"{name} measures what a tensor that requires grad changes, and has no derivative of that"
    with pytest.raises(PlanError, match=text):
        ws.merge(experts, method, base)


def value_of(p: Parameter, i: int = 0) -> float:
    """A number inside the range, away from what is special; that and its neighbours by STEP are numbers in float32."""
    wanted = 0.9 * p.default if isinstance(p.default, float) and p.default else 0.3
    return max(round(wanted * (1 - 0.07 * i) / STEP), 1) * STEP


def cases() -> Iterator[Any]:
    """Every variant of a stage with each of its smooth parameters as a tensor, and as one per expert."""
    for cls in STAGES.values():
        for stage in variants(cls):
            if any(getattr(stage, p.field) == "auto" for p in numbers(cls) if p.name in ("lambda", "scaling")):
                continue  # measured, see `test_what_is_measured_of_a_tensor_is_refused`
            for p in numbers(cls):
                if p.smooth:
                    yield pytest.param(stage, p, 0, id=f"{stage!r}-{p.name}")
                    if p.each:
                        yield pytest.param(stage, p, count_for(stage), id=f"{stage!r}-{p.name}-each")


def with_tensors(stage: Stage, p: Parameter, count: int, dtype: torch.dtype) -> tuple[Stage, list[Tensor]]:
    tensors = [torch.tensor(value_of(p, i), dtype=dtype, requires_grad=True) for i in range(count or 1)]
    return replace(stage, **{p.field: tuple(tensors) if count else tensors[0]}), tensors


def with_its_tensors(stage: Stage) -> Stage:
    """The stage with tensors where it has traced numbers."""
    return opened(stage, lambda v: v.tensor if isinstance(v, Traced) else v)


def directions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: noise(*t.shape, seed=900 + i, dtype=t.dtype) for i, (name, t) in enumerate(state.items())}


def paired(merged: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(merged[n].double() * g).sum() for n, g in gradient.items()]).sum()


@pytest.mark.parametrize(("stage", "p", "each"), list(cases()))
def test_the_pass_equals_autograd_through_the_merge_in_memory(stage: Stage, p: Parameter, each: int):
    base, experts = models(count_for(stage))
    traced, tensors = with_tensors(stage, p, each, torch.float32)
    gradient = directions(base)
    stats = statistics(stage, experts)
    merged = run(pipeline(traced), sites(experts, base, stats), opened=with_its_tensors)
    wanted = torch.autograd.grad(paired(merged, gradient), tensors)

    got = ws.merge(experts, pipeline(traced), base=base, stats=stats if set(stage.traits.needs) - {BASE} else None)
    paired(got, gradient).backward()
    for tensor, want in zip(tensors, wanted, strict=True):
        assert tensor.grad is not None
        assert float((tensor.grad - want).abs()) <= 1e-5 * max(1.0, float(want.abs()))
    plain = ws.merge(experts, pipeline(_numbers(traced, p)), base=base,
                     stats=stats if set(stage.traits.needs) - {BASE} else None)  # fmt: skip
    assert same_bits({n: t.detach() for n, t in got.items()}, plain)


def _numbers(stage: Stage, p: Parameter, change: float = 0.0, place: int = 0) -> Stage:
    """The stage with plain numbers in place of tensors, one of them changed."""
    given = getattr(stage, p.field)
    values = [float(v) for v in (given if isinstance(given, tuple) else (given,))]
    values[place] += change
    return replace(stage, **{p.field: tuple(values) if isinstance(given, tuple) else values[0]})


@pytest.mark.parametrize(("stage", "p", "each"), list(cases()))
def test_autograd_equals_differences(stage: Stage, p: Parameter, each: int):
    """A number that was cut off from its tensor on the way would give autograd less than the merge really changes."""
    base, experts = models(count_for(stage))
    wide = (
        {n: t.double() for n, t in base.items()},
        {m: {n: t.double() for n, t in s.items()} for m, s in experts.items()},
    )
    traced, tensors = with_tensors(stage, p, each, torch.float64)
    stats = {m: {k: {n: t.double() for n, t in of.items()} for k, of in kinds.items()}
             for m, kinds in statistics(stage, experts).items()}  # fmt: skip
    given = sites(wide[1], wide[0], stats)
    gradient = directions(wide[0])
    wanted = torch.autograd.grad(paired(run(pipeline(traced), given, opened=with_its_tensors), gradient), tensors)
    for i, want in enumerate(wanted):
        ends = [paired(run(pipeline(_numbers(traced, p, side * STEP, i)), given), gradient) for side in (1, -1)]
        found = float(ends[0] - ends[1]) / (2 * STEP)
        assert abs(found - float(want)) <= 2e-5 * max(1.0, abs(found)), (found, float(want))


def test_adapters_are_contracted_by_their_factors(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    base = {"layers.0.proj.weight": noise(6, 5, seed=1)}
    factors = {}
    for i, name in enumerate(("a", "b")):
        low, high = noise(6, 2, seed=10 + i), noise(2, 5, seed=20 + i)
        factors[name] = 2.0 * low @ high
        folder = tmp_path / name
        folder.mkdir()
        stored = {"lora_B": low, "lora_A": high}
        save_file({f"base_model.model.layers.0.proj.{part}.weight": t for part, t in stored.items()},
                  folder / "adapter_model.safetensors")  # fmt: skip
        told = {"peft_type": "LORA", "target_modules": ["proj"], "r": 2, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(told))
    tensors = weights(2)
    merged = ws.merge(
        {n: tmp_path / n for n in factors}, "task_arithmetic", base, weight=dict(zip(factors, tensors, strict=True))
    )
    direction = noise(6, 5, seed=9)
    loss = (merged["layers.0.proj.weight"] * direction).sum()
    monkeypatch.setattr(gradient, "_dense", None)  # which would read the task vectors in full
    loss.backward()
    for tensor, delta in zip(tensors, factors.values(), strict=True):
        torch.testing.assert_close(tensor.grad, (delta * direction).sum(), rtol=1e-5, atol=1e-5)


# --- memory, threads, what is asked wrongly ------------------------------------------------------


def planned(count: int, shape: tuple[int, ...], method: str, tensors: list[Tensor]) -> tuple[Any, Any]:
    """The plan and inputs of a merge of one tensor."""
    base = {"layers.0.weight": noise(*shape, seed=1)}
    experts = {f"e{i}": {"layers.0.weight": base["layers.0.weight"] + noise(*shape, seed=2 + i)} for i in range(count)}
    given = {n: MemorySource(s, n) for n, s in {"base": base, **experts}.items()}
    weights = dict(zip(experts, tensors, strict=True))
    recipe = Recipe(base=ModelRef(model="base"), models={n: ModelRef(model=n) for n in experts},
                    method=(StageSpec(name=method, parameters={"weight": weights}),))  # fmt: skip
    inputs = open_inputs(recipe, given)
    return make_plan(recipe, sources=inputs), inputs


def weights(count: int) -> list[Tensor]:
    return [torch.tensor(0.3, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize(("method", "allowed"), [("task_arithmetic", 3.0), ("ties", 9.0)])
def test_memory_does_not_grow_with_the_tensor(method: str, allowed: float):
    """The peak is a few stacks of a block, however large the tensor."""
    tensors = weights(3)
    peaks = []
    for rows in (1024, 4096):
        shape = (rows, 512)
        plan, inputs = planned(3, shape, method, tensors)
        back, gradient = Pullback.of(plan, inputs), noise(*shape, seed=9)
        with Peak() as watch:
            back.one("layers.0.weight", gradient)
        peaks.append(watch.peak)
    stack = 4 * (1 << 18) * 4
    assert peaks[1] <= 1.1 * peaks[0]
    assert peaks[1] <= allowed * stack


def test_threads_do_not_change_the_numbers():
    tensors = weights(3)
    plan, inputs = planned(3, (20000, 512), "ties", tensors)
    gradient = {"layers.0.weight": noise(20000, 512, seed=9)}
    one, two = (Pullback.of(plan, inputs).all(gradient, threads) for threads in (1, 2))
    assert all(torch.equal(one[t], two[t]) for t in tensors)


def test_equal_numbers_in_two_tensors_are_two_parameters():
    tensors = weights(2)
    plan, inputs = planned(2, (6, 4), "task_arithmetic", tensors)
    gradient = noise(6, 4, seed=9)
    found = pull(plan, inputs, {"layers.0.weight": gradient})
    for i, tensor in enumerate(tensors):
        want = (gradient * noise(6, 4, seed=2 + i)).sum()
        assert float(found[tensor]) == pytest.approx(float(want), rel=1e-5)


def test_one_tensor_for_a_ramp_over_depth_and_for_several_models():
    base = {f"layers.{i}.weight": noise(3, 3, seed=i) for i in range(3)}
    experts = {
        f"e{j}": {n: t + noise(3, 3, seed=10 * j + i + 5) for i, (n, t) in enumerate(base.items())} for j in (0, 1)
    }
    first, last = weights(2)
    merged = ws.merge(experts, "task_arithmetic", base, lambda_=[first, last])
    gradient = directions(base)
    paired(merged, gradient).backward()
    change = {n: sum(((experts[e][n] - base[n]) * gradient[n]).sum() for e in experts) for n in base}
    assert float(first.grad) == pytest.approx(
        float(change["layers.0.weight"] + change["layers.1.weight"] / 2), rel=1e-4
    )
    assert float(last.grad) == pytest.approx(float(change["layers.2.weight"] + change["layers.1.weight"] / 2), rel=1e-4)


def test_a_gradient_of_another_name_or_shape_is_refused():
    plan, inputs = planned(2, (6, 4), "task_arithmetic", weights(2))
    with pytest.raises(
        PlanError, match=r"gradient of 'layers\.0\.weigth': the merge makes no such tensor; did you mean"
    ):
        pull(plan, inputs, {"layers.0.weigth": noise(6, 4)})
    with pytest.raises(PlanError, match=r"gradient of 'layers\.0\.weight' has shape \[4, 6\], the tensor \[6, 4\]"):
        pull(plan, inputs, {"layers.0.weight": noise(4, 6)})


def test_tied_names_share_the_merged_tensor_and_its_gradient():
    shared = noise(5, 2, seed=3)
    base = {"embed_tokens.weight": shared, "lm_head.weight": shared}
    other = shared + 1
    weight = torch.tensor(0.5, requires_grad=True)
    merged = ws.merge(
        [{"embed_tokens.weight": other, "lm_head.weight": other}], "task_arithmetic", base, lambda_=weight
    )
    assert merged["embed_tokens.weight"] is merged["lm_head.weight"]
    merged["embed_tokens.weight"].sum().backward()
    assert float(weight.grad) == pytest.approx(10.0)


def test_what_does_not_depend_on_a_tensor_has_no_gradient():
    base = {"a": noise(3, seed=1), "b": noise(3, seed=2)}
    weight = torch.tensor(0.5, requires_grad=True)
    rules = [{"match": "b", "method": "keep"}]
    merged = ws.merge([{n: t + 1 for n, t in base.items()}], "task_arithmetic", base, lambda_=weight, rules=rules)
    assert merged["a"].requires_grad
    assert not merged["b"].requires_grad


def test_a_folder_takes_the_number(tmp_path: Any):
    base = {"a": noise(3, seed=1)}
    weight = torch.tensor(0.5, requires_grad=True)
    ws.merge([{"a": base["a"] + 1}], "task_arithmetic", base, tmp_path / "out", lambda_=weight)
    assert torch.allclose(ws.open_source(tmp_path / "out").read("a"), base["a"] + 0.5)


@pytest.mark.parametrize("kernels", ["0", "1"])
def test_a_broken_input_is_named(kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if kernels == "0":
        monkeypatch.setattr(gradient, "carried_out_here", lambda task: replace(task, way=Way.ROWS))
    tensors = {f"e{i}": torch.tensor(0.3, requires_grad=True) for i in range(2)}
    state = {"w": noise(300, 8, seed=1)}
    for i, name in enumerate(["base", "e0", "e1"]):
        wrong = {"w": state["w"] + i}
        wrong["w"][200, 3] = float("nan") if name == "e1" else 1.0
        save_file(wrong, tmp_path / f"{name}.safetensors")
    recipe = Recipe(base=ModelRef(model=str(tmp_path / "base.safetensors")),
                    models={n: ModelRef(model=str(tmp_path / f"{n}.safetensors")) for n in tensors},
                    method=(StageSpec(name="task_arithmetic", parameters={"weight": tensors}),))  # fmt: skip
    inputs = open_inputs(recipe)
    with pytest.raises(NumericError, match=r"w.*e1.*200"):
        pull(make_plan(recipe, sources=inputs), inputs, {"w": noise(300, 8, seed=3)})
