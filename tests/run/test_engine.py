"""The engine's promise: the same bytes in memory, streamed, cut anywhere, on threads and in another process."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith
from goldens import tiny_llama
from run.small_inputs import small_inputs
from weightsmith.core.method import Filter, Grain, Method, registered
from weightsmith.engine.carry import carry_out, context_of, summarise
from weightsmith.engine.execute import execute
from weightsmith.engine.runner import SerialRunner, ThreadRunner
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import RecipeSource
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

NAMES = sorted(name for name, cls in registered().items() if issubclass(cls, (Filter, Method)) and name != "keep")
BARE = {"slerp": {"t": 0.3}, "dare": {"density": 0.6}, "mwa": {"value": 0.5}}


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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(bits[a[n].itemsize]), b[n].view(bits[b[n].itemsize]))
        for n in a
    )


def of(name: str, inputs: Inputs) -> tuple[Recipe, Inputs]:
    stage = registered()[name](**BARE.get(name, {}))
    most = stage.traits.max_count or 3
    count = next(n for n in (3, 2, 1) if n <= most and stage.check(n, True) is None)
    return recipe({name: BARE.get(name, {})}, count=count), only(inputs, count)


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_however_it_is_run(name: str, inputs: Inputs) -> None:
    wanted, given = of(name, inputs)
    whole = merged(wanted, given)
    for block in (1, 100, 1 << 30):
        assert same(whole, merged(wanted, given, block=block)), f"blocks of {block}"
    for threads in (2, 8):
        assert same(whole, merged(wanted, given, threads=threads, runner=ThreadRunner(threads))), f"{threads} threads"


UNMEASURED = [name for name in NAMES if registered()[name](**BARE.get(name, {})).rounds == 0]


@pytest.mark.parametrize("name", UNMEASURED)
def test_same_bytes_with_parts_of_one_row(name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that may be cut are separate tasks, in any order.  (Sums of float64 have their parts fixed.)"""
    wanted, given = of(name, inputs)
    whole = merged(wanted, given)
    monkeypatch.setattr("weightsmith.core.task.PART_BYTES", 200)
    plan = make_plan(wanted, sources=given, threads=1)
    sink = MemorySink()
    carry_out(replace(plan, tasks=plan.tasks[::-1]), given, sink)
    assert same(whole, {n: sink.tensors()[n] for n in whole})


def _in_child(payload: bytes) -> list[tuple[str, int, np.ndarray]]:
    task, context = pickle.loads(payload)
    torch.set_num_threads(1)
    written: list[tuple[str, int, np.ndarray]] = []

    class Collect(MemorySink):
        def write(self, name: str, start: int, bits: np.ndarray) -> None:
            written.append((name, start, bits.copy()))

    execute(task, context, Collect())
    return written


def test_same_bytes_in_another_process(inputs: Inputs) -> None:
    """Tasks, sources and summaries cross processes: what a cluster needs."""
    jobs, expected, starts = [], [], []
    for name in NAMES:
        wanted, given = of(name, inputs)
        plan = make_plan(wanted, sources=given, threads=1)
        context = context_of(plan, given)
        context = replace(context, summaries=summarise(plan.tasks, context, SerialRunner()))
        whole = merged(wanted, given)
        for task in plan.tasks[::9]:
            jobs.append(pickle.dumps((task, replace(context, progress=_nothing))))
            expected.append(whole)
            starts.append(name)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for name, whole, written in zip(starts, expected, pool.map(_in_child, jobs, chunksize=8), strict=True):
            for tensor, start, bits in written:
                there = whole[tensor].view(torch.int16).numpy()
                rows = there[start : start + bits.shape[0]] if bits.ndim else there
                assert np.array_equal(rows, bits.view(np.int16)), (name, tensor)


def _nothing(count: int) -> None:
    pass


@pytest.mark.parametrize("name", NAMES)
def test_streamed_from_disk_equals_memory(name: str, inputs: Inputs, tmp_path: Path) -> None:
    wanted, given = of(name, inputs)
    for who, source in given.models:
        (tmp_path / who).mkdir()
        save_file({k: source.read(k) for k in source.keys}, tmp_path / who / "model.safetensors")
    for stat, by_model in given.stats.items():
        for who, source in by_model.items():
            (tmp_path / f"{who}-stats").mkdir(exist_ok=True)
            about = {"weightsmith": f'{{"stat": "{stat}", "examples": 3, "rows": 96, "aliases": {{}}}}'}
            save_file(
                {k: source.read(k) for k in source.keys}, tmp_path / f"{who}-stats" / f"{stat}.safetensors", about
            )
    models = {n: ModelRef(model=str(tmp_path / n), stats=(str(tmp_path / f"{n}-stats"),)) for n in given.experts}
    on_disk = wanted.model_copy(update={"base": ModelRef(model=str(tmp_path / "base")), "models": models})
    result = run(on_disk, tmp_path / "out", threads=2)
    assert same(merged(wanted, given), {n: load_file(result.out / "model.safetensors")[n] for n in given.base.keys})


def test_nested_recipe_equals_two_stages(inputs: Inputs) -> None:
    inner = recipe("ties", count=2)
    first = merged(inner, only(inputs, 2))
    outer = Recipe(base=ModelRef(model="base"), models={"n": ModelRef(model=inner), "e2": ModelRef(model="e2")},
                   method=(StageSpec(name="task_arithmetic"),), parameters={"lambda": 0.4})  # fmt: skip
    nested = Inputs(inputs.base, {"n": RecipeSource(inner, only(inputs, 2)), "e2": inputs.experts["e2"]})
    staged = Inputs(inputs.base, {"n": MemorySource(first, "n"), "e2": inputs.experts["e2"]})
    assert same(merged(outer, nested), merged(outer, staged))
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
    assert any(cls.traits.grain is Grain.GROUP for cls in registered().values())
