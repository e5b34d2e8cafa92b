"""The bytes that a plan says are read are those that are read, for every registered method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kit import count_for
from run.peaks import methods, spec, stage_of
from weightsmith.core.method import BASE, Codec, Filter, MergedFilter, Stage, StandaloneCodec, registered
from weightsmith.engine.carry import Job, carry_out, carry_out_all
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.read import files
from weightsmith.io.read.source import Bits, MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.merge import run
from weightsmith.jobs.sweep import plan_sweep
from weightsmith.kernels.cuts import Entries, tensor_cuts
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import Recipe

SHAPES = {f"model.layers.{i}.mlp.{name}_proj.weight": shape for i, shape in enumerate([(80, 300), (300, 80)])
          for name in ("up", "down")}  # fmt: skip
SHAPES = {**SHAPES, "model.embed_tokens.weight": (700, 60), "model.norm.weight": (60,)}


class Counting(MemorySource):
    """Counts the bytes that are read."""

    nbytes = 0

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        found = super().block(name, low, high)
        self.nbytes += found.array.nbytes
        return found


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=draw) + 0.1 * torch.randn(s, generator=noise)).bfloat16()
            for n, s in SHAPES.items()}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several blocks, some of which are kept and some not, and whose cuts are not found by sorting."""
    monkeypatch.setattr("weightsmith.core.task.BLOCK", 4000)
    monkeypatch.setattr("weightsmith.core.task.KEPT", 110_000)
    for name, value in (("SAMPLE", 1200), ("PLACES", 4), ("MARGIN", 0.05), ("BINS", 1 << 24)):
        monkeypatch.setattr(f"weightsmith.kernels.cuts.{name}", value)


def inputs_for(stages: list[Stage], count: int) -> Inputs:
    needs = {stat for stage in stages for stat in stage.traits.needs} - {BASE}
    names = [f"e{i}" for i in range(count)]
    stats: dict[str, dict[str, MemorySource]] = {}
    for stat in needs:
        made = {n: torch.eye(s[-1]) if stat == "gram" else torch.ones(s) for n, s in SHAPES.items()
                if len(s) == 2 or stat != "gram"}  # fmt: skip
        stats[stat] = {name: Counting(made, stat) for name in names}
    return Inputs(Counting(tensors(1), "base"), {n: Counting(tensors(2 + i), n) for i, n in enumerate(names)}, stats)


def read_of(inputs: Inputs) -> int:
    found = [source for _, source in inputs.models]
    found += [source for by in inputs.stats.values() for source in by.values()]
    return sum(source.nbytes for source in found)  # type: ignore[attr-defined]


def stages_of(name: str, **more: Any) -> list[Stage]:
    stage = stage_of(name, **more)
    plain = registered()["task_arithmetic"]()
    if isinstance(stage, MergedFilter) or (isinstance(stage, Codec) and not isinstance(stage, StandaloneCodec)):
        return [plain, stage]
    return [stage, plain] if isinstance(stage, Filter) else [stage]


def planned_and_read(stages: list[Stage], count: int) -> tuple[int, int]:
    inputs = inputs_for(stages, count)
    recipe = Recipe.model_validate({
        "base": "base", "models": {n: n for n in inputs.experts}, "method": [spec(s) for s in stages],
    })  # fmt: skip
    encode = isinstance(stages[-1], Codec)
    plan = make_plan(recipe, sources=inputs, threads=1, encode=encode)
    before = read_of(inputs)
    carry_out(plan, inputs, MemorySink())
    return plan.read_bytes, read_of(inputs) - before


@pytest.mark.parametrize("name", methods())
def test_every_method_reads_what_is_planned(name: str) -> None:
    count = count_for(stage_of(name))
    planned, read = planned_and_read(stages_of(name), count)
    assert planned == pytest.approx(read, rel=0.03)


PASSES = [
    ([("ties", {"scope_": "tensor"})], "a cut and signs"),
    ([("ties", {"scope_": "tensor", "zero_sign": "plus"})], "a cut"),
    ([("ties", {"scope_": "tensor", "density": (0.1, 0.2, 0.3)})], "a cut of each"),
    ([("ties", {"scope_": "tensor", "sign": "count"})], "torch"),
    ([("ties", {"density": 1.0})], "signs alone"),
    ([("breadcrumbs", {"rescale": True}), ("task_arithmetic", {})], "two cuts, masses"),
    ([("dare", {"density": 0.5, "rescale_rule": "l1"}), ("ties", {"density": 1.0})], "masses, signs of the model"),
    ([("magnitude", {}), ("tsvm", {})], "torch, no longer one by one"),
]


@pytest.mark.parametrize("kernels", ["1", "0"])
@pytest.mark.parametrize(("method", "_what"), PASSES)
def test_passes_are_counted_as_they_are_made(
    method: list[tuple[str, Mapping[str, Any]]], _what: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "0":
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    planned, read = planned_and_read([stage_of(name, **more) for name, more in method], 3)
    assert planned == pytest.approx(read, rel=0.03)


def test_a_sweep_reads_what_is_planned_for_all_variants(tmp_path: Path) -> None:
    """By density and by another method beside it; and what comes expert by expert alone comes once for all."""
    for method, values in [("ties", ({"scope": "tensor", "density": d} for d in (0.1, 0.2, 0.6))),
                           ("iso_cts", ({}, {}))]:  # fmt: skip
        inputs = inputs_for([], 3)
        models = {n: n for n in inputs.experts}
        recipes = {f"v{i}": Recipe.model_validate({"base": "base", "models": models, "method": {method: value}})
                   for i, value in enumerate(values)}  # fmt: skip
        swept = plan_sweep(recipes, tmp_path / "out", sources=inputs, threads=1)
        assert not swept.problems
        carry_out_all([Job(one.plan, one.inputs, MemorySink()) for one in swept.jobs.values()])
        assert swept.read_bytes == pytest.approx(read_of(inputs), rel=0.03)


def on_disk(folder: Path, method: Mapping[str, Any]) -> Recipe:
    """A base and two experts of two matrices, of integers that are equal everywhere and of a tensor that is kept."""
    names = ("base", "a", "b")
    for i, name in enumerate(names):
        (folder / name).mkdir()
        draw = torch.Generator().manual_seed(i)
        made = {f"model.layers.{j}.mlp.up_proj.weight": torch.randn(800, 700, generator=draw) for j in range(2)}
        same = {"model.position_ids": torch.arange(100_000), "model.kept": torch.ones(300_000)}
        save_file(made | same, folder / name / "model.safetensors")
    return Recipe.model_validate({
        "base": str(folder / "base"), "models": {n: str(folder / n) for n in names[1:]}, "exclude": "model.kept",
        "method": method,
    })  # fmt: skip


@pytest.mark.parametrize(("method", "threads"), [("linear", 1), ("ties", 2), ("tsvm", 1)])
def test_the_disk_is_asked_ahead_in_every_kind_of_merge(
    method: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels, measuring passes, several threads, and methods that read whole matrices, expert by expert."""
    asked: dict[str, set[int]] = {}
    call = system.call

    def seen(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is os.posix_fadvise and args[3] == os.POSIX_FADV_WILLNEED:
            path = Path(f"/proc/self/fd/{args[0]}").readlink()
            asked.setdefault(path.parent.name, set()).update(range(args[1] >> 12, (args[1] + args[2]) >> 12))
        if function is os.preadv and len(args) == 4:
            raise BlockingIOError  # as if nothing were in memory
        return call(function, *args, **kwargs)

    monkeypatch.setattr(files, "_AHEAD", 2 << 20)
    monkeypatch.setattr(system, "call", seen)
    run(on_disk(tmp_path, {method: {}}), tmp_path / "out", threads=threads)
    matrices = 2 * 4 * 800 * 700 >> 12  # in pages; the first block is read, not announced
    assert asked.keys() == {"base", "a", "b"}
    assert all(len(pages) > 0.7 * matrices for pages in asked.values())


def test_files_are_read_as_often_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the door to the disk: tensors, headers and the samples that tell files apart; what is copied, and compared."""
    read, preadv = [], files.preadv

    def counting(fd: int, buffer: memoryview, offset: int) -> int:
        read.append(preadv(fd, buffer, offset))
        return read[-1]

    recipe = on_disk(tmp_path, {"ties": {"scope": "tensor", "zero_sign": "plus"}})
    monkeypatch.setattr(files, "preadv", counting)
    result = run(recipe, tmp_path / "out", threads=1)
    assert result.read_bytes == pytest.approx(sum(read), rel=0.05)
    assert result.read_bytes > 2 * 3 * 2 * 4 * 800 * 700, "the matrices twice"


@pytest.mark.parametrize("filters", ["magnitude", "breadcrumbs"])
def test_cuts_of_a_tensor_are_found_once_for_all_looks_over_the_model(
    filters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three looks of TIES and the merge stand behind them."""
    found: list[np.ndarray] = []

    def counted(ranks: Sequence[Sequence[int]], entries: Entries) -> np.ndarray:
        found.append(tensor_cuts(ranks, entries))
        return found[-1]

    monkeypatch.setattr("weightsmith.engine.passes.tensor_cuts", counted)
    given = {name: MemorySource(tensors(i), name) for i, name in enumerate(("base", "a", "b"))}
    recipe = Recipe.model_validate({"base": "base", "models": {n: n for n in "ab"}, "method": [filters, "ties"]})
    inputs = Inputs(given["base"], {n: given[n] for n in "ab"})
    carry_out(make_plan(recipe, sources=inputs, threads=1), inputs, MemorySink())
    assert len(found) == len(SHAPES)
