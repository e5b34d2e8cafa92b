"""Merging on devices, as far as it can be seen without one: the CPU takes their part (`accelerator.Host`)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightsmith
from kit import texts
from weightsmith.core.errors import NumericError, OutputError, PlanError, WeightsmithError
from weightsmith.core.method import Pipeline
from weightsmith.devices.accelerator import Accelerator, Cuda, Host, accelerator_of
from weightsmith.engine import lanes as lanes_module
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.jobs.sweep import run_sweep
from weightsmith.jobs.verify import rerun
from weightsmith.plan import fit as fit_module
from weightsmith.plan.fit import LANES, SHARE, STAGES
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.load import loads
from weightsmith.recipe.schema import Recipe

NAMES = ("base", "a", "b", "c")


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(48, 40).bfloat16() for i in range(6)}
    made |= {f"model.layers.{i}.norm.weight": torch.randn(48) for i in range(6)}
    return {**made, "model.embed_tokens.weight": torch.randn(90, 40).half(), "scale": torch.randn(()),
            "steps": torch.arange(5), "model.layers.0.conv.weight": torch.randn(8, 3, 2).double()}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        save_file(tensors(seed), tmp_path / name / "model.safetensors")
    return tmp_path


def recipe(folder: Path, text: str = "method: ties") -> Recipe:
    paths = "\n".join(f"  {name}: {folder / name}" for name in NAMES[1:])
    return loads(f"base: {folder / 'base'}\nmodels:\n{paths}\nexclude: [steps]\n{text}\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Late(Host):
    """Three devices that are slow, in turn, and end their copies as late as they may.

    What comes back is there when its mark has been waited for and not before; what goes in must stay in its buffer
    until then.
    """

    count: int = 3
    memory: int | None = None
    flying: dict[int, list[tuple[Tensor, Tensor, bool]]] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)

    def devices(self) -> tuple[str, ...]:
        return tuple(f"cpu:{i}" for i in range(self.count))

    def staging(self, nbytes: int) -> Tensor:
        self.seen.append(("staging", str(nbytes)))
        return super().staging(nbytes)

    @contextlib.contextmanager
    def using(self, device: str, stream: Any) -> Iterator[None]:
        self.seen.append(("using", device))
        time.sleep(0.002 * (3 - int(device[-1])))
        yield

    def copy_in(self, target: Tensor, staged: Tensor) -> None:
        target.copy_(staged)
        self.seen.append(("in", str(list(staged.shape))))
        assert staged.data_ptr() not in self.busy, "used again while it is copied"
        self.busy.add(staged.data_ptr())
        self._mine().append((staged, staged.clone(), False))

    def copy_out(self, staged: Tensor, value: Tensor) -> None:
        _bytes(staged).fill_(0xAB)
        self._mine().append((staged, value.clone(), True))

    def mark(self) -> Any:
        return self.flying.pop(threading.get_ident(), [])

    def wait(self, mark: Any) -> None:
        for staged, copied, back in mark:
            if back:
                staged.copy_(copied)
            self.busy.discard(staged.data_ptr())
            assert torch.equal(_bytes(staged), _bytes(copied)), "overwritten while it was copied"
        mark.clear()

    def settle(self, device: str) -> None:
        self.busy.clear()  # buffers of the next run may lie in the same place

    def _mine(self) -> list[tuple[Tensor, Tensor, bool]]:
        return self.flying.setdefault(threading.get_ident(), [])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


RECIPES = {
    "ties": "method: ties",
    "ramp and a rule": ("method: [{dare: {density: [0.2, 0.8]}}, ties]\nrules: [{layers: [0, 3], method: tsvm}]"),
    "other dtype": "method: task_arithmetic\noutput: {dtype: float32}",
    "rows": "method: model_stock",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("accelerator", [Host(), Late()], ids=["one", "three, out of order"])
def test_the_same_folder_as_without_devices(text: str, accelerator: Accelerator, models: Path) -> None:
    wanted = recipe(models, text)
    near = run(wanted, models / "out", threads=1).out.rename(models / "near")
    far = run(wanted, models / "out", device=accelerator).out
    assert contents(far) == contents(near)


def test_pieces_smaller_than_rows_and_tensors(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(models, RECIPES["ramp and a rule"])
    near = run(wanted, models / "near", threads=1).out
    for size in (64, 200):  # a row takes 80 bytes
        monkeypatch.setattr(fit_module, "STAGES", (size,))
        far = run(wanted, models / f"far-{size}", device=Late()).out
        assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()


def planned(wanted: Recipe, **how: Any) -> Plan:
    return make_plan(wanted, sources=open_inputs(wanted), **how)


def test_tasks_are_spread_over_all_devices_and_buffers_are_bounded(models: Path) -> None:
    late = Late()
    run(recipe(models), models / "far", device=late)
    begun = [device for what, device in late.seen if what == "using"]
    assert {begun.count(device) > 2 for device in late.devices()} == {True}
    plan = planned(recipe(models), device=Late())
    assert plan.fit is not None
    assert plan.threads == 3 * LANES
    assert [int(size) for what, size in late.seen if what == "staging"] == [plan.fit.stage] * 3 * plan.threads
    assert plan.peak_bytes > 3 * plan.threads * plan.fit.stage
    assert planned(recipe(models), device=Late(), threads=4).threads == 3


def test_memory_is_obeyed_by_smaller_buffers_then_fewer_lanes(models: Path) -> None:
    free = planned(recipe(models), device=Host(2))
    limits = [free.peak_bytes - 1, 450_000_000, 330_000_000]
    plans = [planned(recipe(models), device=Host(2), memory=limit) for limit in limits]
    assert [plan.peak_bytes <= limit for plan, limit in zip(plans, limits, strict=True)] == [True] * 3
    used = [(plan.fit.lanes, plan.fit.stage) for plan in plans if plan.fit is not None]
    assert used == sorted(used, reverse=True)
    assert used[0] == (LANES, free.fit.stage // 2 if free.fit else 0)
    assert used[-1][0] < LANES
    with pytest.raises(
        PlanError, match=r"--memory 100 MB is too little for host: one lane on each device needs \d+ MB"
    ):
        planned(recipe(models), device=Host(2), memory=100_000_000)


def test_blocks_follow_from_what_is_free_on_the_device() -> None:
    huge = {"model.embed_tokens.weight": torch.empty(150_000, 4000, device="meta", dtype=torch.bfloat16)}
    inputs = weightsmith.inputs.opened.Inputs(  # type: ignore[attr-defined]
        MetaSource(huge), {name: MetaSource(huge) for name in "ab"}
    )
    wanted = Recipe.model_validate({"base": "b", "models": {"a": "a", "b": "b"}, "method": "dare"})
    sizes = []
    for free in (80_000_000_000, 1_500_000_000, 150_000_000):
        fit = make_plan(wanted, sources=inputs, device=Host(memory=free)).fit
        assert fit is not None
        assert fit.device_bytes <= SHARE * free
        assert not fit.on_cpu
        sizes.append((fit.lanes, fit.block))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


class MetaSource(weightsmith.io.read.source.MemorySource):  # type: ignore[name-defined,misc]
    """Headers only."""

    def __init__(self, found: Mapping[str, Tensor]) -> None:
        super().__init__(found, "headers")


def test_what_no_device_has_room_for_is_done_on_the_cpu(models: Path) -> None:
    wanted = recipe(models, "method: tsvm")
    near = run(wanted, models / "near", threads=1).out
    peaks = sorted({task.peak for task in planned(wanted, device=Host()).tasks})
    tight = Late(memory=int((peaks[-2] + 2 * STAGES[-1]) / SHARE) + 2)  # the embedding does not fit, all others do
    plan = planned(wanted, device=tight)
    assert plan.fit is not None
    assert texts(plan.warnings) == [plan.fit.note]
    assert "no room on cpu:0 and cpu:1 and cpu:2 and will be done on the CPU (the first: " in plan.warnings[0].text
    assert plan.fit.on_cpu == {"model.embed_tokens.weight:0"}
    far = run(wanted, models / "far", device=tight)
    assert far.warnings == plan.warnings
    assert ("in", "[48, 40]") in tight.seen
    assert ("in", "[90, 40]") not in tight.seen
    assert (far.out / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()


@dataclass(frozen=True)
class Full(Host):
    """Runs out of memory at some copies, counted from 0."""

    at: frozenset[int] = frozenset()
    copies: list[int] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)

    def copy_in(self, target: Tensor, staged: Tensor) -> None:
        self.copies.append(len(self.copies))
        if self.copies[-1] in self.at or -1 in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        super().copy_in(target, staged)

    def settle(self, device: str) -> None:
        self.settled.append(device)


def test_a_device_that_runs_out_of_memory_is_tried_again(models: Path) -> None:
    wanted = recipe(models)
    near = run(wanted, models / "near", threads=1).out
    full = Full(at=frozenset({3, 4, 11, 40}))
    far = run(wanted, models / "far", device=full).out
    assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()
    assert len(full.settled) > 1  # and once at the end


def test_blocks_shrink_until_there_is_room(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "SMALLEST", 100)
    wanted = recipe(models, "method: [{dare: {density: 0.6}}, ties]")
    near = run(wanted, models / "near", threads=1).out
    seen, merge = [], Pipeline.merge

    def greedy(self: Pipeline, site: Any, summaries: Any = None) -> Tensor:
        seen.append(site.stack[0].numel())
        if seen[-1] > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return merge(self, site, summaries)

    monkeypatch.setattr(Pipeline, "merge", greedy)
    far = run(wanted, models / "far", device=Host()).out
    assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()
    assert max(seen) > 1000
    assert seen[-1] <= 1000


def test_memory_that_stays_full_is_one_line_and_the_run_can_be_resumed(models: Path) -> None:
    wanted = recipe(models, "method: task_arithmetic")
    near = run(wanted, models / "out", threads=1).out.rename(models / "near")
    with pytest.raises(
        WeightsmithError, match=r"^cpu has too little free memory for \S+, even alone and in the"
    ) as said:
        run(wanted, models / "none", device=Full(at=frozenset({-1})), threads=1)
    assert "\n" not in str(said.value)
    assert not (models / "none").exists()
    half = Full(at=frozenset(range(20, 2000)))
    with pytest.raises(WeightsmithError, match="too little free memory"):
        run(wanted, models / "out", device=half, threads=1)
    again = Full()
    run(wanted, models / "out", device=again, resume=True)
    assert contents(models / "out") == contents(near)
    whole = Full()
    run(wanted, models / "whole", device=whole)
    assert len(again.copies) < len(whole.copies), "finished tasks are not done again"


def test_an_error_in_the_middle_ends_the_run_as_on_the_cpu(models: Path) -> None:
    broken = tensors(1)
    broken["model.layers.3.mlp.up_proj.weight"][7, 5] = float("nan")
    save_file(broken, models / "a" / "model.safetensors")
    said = []
    for accelerator in ("cpu", Late()):
        with pytest.raises(NumericError, match=r"layers.3.*in a holds NaN at \[7, 5\]") as error:
            run(recipe(models, "method: task_arithmetic"), models / f"out{len(said)}", device=accelerator)
        said.append(str(error.value))
        assert not (models / f"out{len(said)}").exists()
    assert said[0] == said[1]


def test_a_sweep_and_nested_merges(models: Path) -> None:
    nested = recipe(models).model_dump(mode="json", exclude_defaults=True)
    inner = {**nested, "method": [{"name": "task_arithmetic"}]}
    nested = {**nested, "models": {**nested["models"], "b": {"model": inner}}}
    variants = {f"d{d}": Recipe.model_validate({**nested, "parameters": {"density": d}}) for d in (0.1, 0.5)}
    run_sweep(variants, models / "near", threads=1)
    run_sweep(variants, models / "far", device=Late())
    for name in variants:
        assert contents(models / "far" / name) == contents(models / "near" / name)


@dataclass(frozen=True)
class Inexact(Host):
    """Says of itself what a GPU does: that its bytes are not the CPU's."""

    kind = "cuda"
    exact = False


def test_bytes_of_a_device_are_never_mixed_with_those_of_another(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, broken = recipe(models, "method: task_arithmetic"), Pipeline.merge

    def fails_late(self: Pipeline, site: Any, summaries: Any = None) -> Tensor:
        if "layers.4" in site.key.name:
            raise OSError("the power is gone")
        return broken(self, site, summaries)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "merge", fails_late)
        with pytest.raises(OSError, match="the power is gone"):
            run(wanted, models / "out", device=Inexact(), threads=1)
    with pytest.raises(OutputError, match="device"):
        run(wanted, models / "out", resume=True)
    out = run(wanted, models / "out", device=Inexact(), resume=True).out
    assert '"device": "cuda"' in (out / "weightsmith.json").read_text()
    (text,) = rerun(out)
    assert text.startswith("the recipe cannot be run again: --device cuda: torch ")
    monkeypatch.setattr("weightsmith.plan.room.accelerator_of", lambda device: {"cuda": Inexact()}[device])
    assert rerun(out) == []


def test_a_cluster_and_devices_exclude_each_other(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        remote = True

    monkeypatch.setattr("weightsmith.engine.cluster.ray_runner", lambda *_, **__: contextlib.nullcontext(Elsewhere()))
    with pytest.raises(
        WeightsmithError, match="--ray with --device host: the workers of a cluster merge on their CPUs"
    ):
        run(recipe(models), models / "out", device=Host(), ray="local")


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator_of("auto") is accelerator_of("cpu") is None
    for name in ("cuda", "cuda:1"):
        with pytest.raises(
            WeightsmithError, match=f"^--device {name}: torch .* sees no CUDA device; use --device cpu$"
        ):
            accelerator_of(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert accelerator_of("auto") is None, "bytes that are the same everywhere are the default"
    assert accelerator_of("cuda") == Cuda(("cuda:0", "cuda:1"))
    assert accelerator_of("cuda:1") == Cuda(("cuda:1",))
    with pytest.raises(WeightsmithError, match="--device cuda:2: torch sees cuda:0, cuda:1; name one of them"):
        accelerator_of("cuda:2")


def test_merging_in_memory(models: Path) -> None:
    states = {name: tensors(seed) for seed, name in enumerate(NAMES)}
    base = states.pop("base")
    expected = weightsmith.merge(states, "ties", base=base, exclude=["steps"])
    got = weightsmith.merge(states, "ties", base=base, exclude=["steps"], device=Late())
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []
