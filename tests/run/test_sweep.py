"""Sweeps: several variants in one pass over the inputs, each with the bytes of a run of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from run.small_inputs import EXPERTS, small_inputs
from weightsmith.cli.main import main
from weightsmith.cli.show import size
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.method import registered
from weightsmith.engine.carry import Job, carry_out, carry_out_all
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import Bits, MemorySource
from weightsmith.io.write.output import FolderSink
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.jobs.sweep import plan_sweep, run_sweep
from weightsmith.kernels.cuts import Cells
from weightsmith.kernels.merge import Merge
from weightsmith.ops.length import Scaled
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe
from weightsmith.recipe.sweep import expand, load_variants

TIED: list[dict[str, Any]] = [{"density": 0.3}, {"density": 0.3, "lambda": 0.5}, {"density": 0.5, "aggregate": "sum"},
        {"density": 0.3, "zero_sign": "plus"}, {"density": 0.3, "weight": 2.0}, {"density": 0.3, "sign": "count"},
        {"density": 0.3, "sign": "normmass"}]  # fmt: skip


class Counting(MemorySource):
    """Counts how many entries are read."""

    entries = 0

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        found = super().block(name, low, high)
        self.entries += found.array.size
        return found


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return small_inputs(Counting)


def recipe(method: Any, **more: Any) -> Recipe:
    models = {name: ModelRef(model=name) for name in EXPERTS}
    return Recipe(base=ModelRef(model="base"), models=models, method=method, **more)


def bits(sink: MemorySink) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in sink.tensors().items()}


def alone(wanted: Recipe, given: Inputs, **how: Any) -> dict[str, bytes]:
    sink = MemorySink()
    carry_out(make_plan(wanted, sources=given, threads=1), given, sink, **how)
    return bits(sink)


def together(wanted: list[Recipe], given: Inputs, **how: Any) -> list[dict[str, bytes]]:
    jobs = [Job(make_plan(one, sources=given, threads=1), given, MemorySink()) for one in wanted]
    carry_out_all(jobs, **how)
    return [bits(job.sink) for job in jobs]  # type: ignore[arg-type]


MIXED = ["ties", "della", "linear", "magnitude", "model_stock", "fisher", "regmean", "tsvm", "sce",
         "consensus", "lines", "keep"]  # fmt: skip


def test_unlike_methods_side_by_side_give_the_bytes_of_separate_runs(inputs: Inputs) -> None:
    """They read other ranges in another order, with and without measuring passes, model-wide ones among them."""
    wanted = [recipe({name: {}}) for name in MIXED]
    wanted += [
        recipe({"dare": {"density": 0.6}}, seed=1),
        recipe({"breadcrumbs": {"density": 0.5}}),
        recipe({"ties": {"density": 0.3, "scope": "global"}}),
        recipe({"ties": {"density": 0.6, "scope": "global"}}),
        recipe("ties", exclude="*embed*", seed=4),
        *(recipe({"ties": {"scope": "tensor", **more}}) for more in TIED),
    ]
    for one, found in zip(wanted, together(wanted, inputs), strict=True):
        assert found == alone(one, inputs), one.method


@pytest.mark.parametrize("kernels", ["1", "0"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "tsvm"])
def test_inputs_are_read_once_for_all_variants(
    method: str, kernels: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "0":
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    monkeypatch.setattr("weightsmith.core.task.KEPT", 5000)  # some tensors above it, some below
    monkeypatch.setattr("weightsmith.core.task.BLOCK", 1000)
    given = replace(inputs, experts={"e0": inputs.experts["e0"]}) if method == "slerp" else inputs
    key, values = {"slerp": "t", "tsvm": "scaling"}.get(method, "lambda"), (0.1, 0.5, 0.9)
    wanted = [recipe(method, parameters={key: value}) for value in values]
    if method == "slerp":
        wanted = [one.model_copy(update={"models": {"e0": ModelRef(model="e0")}}) for one in wanted]

    def read_by(action: Callable[[], Any]) -> int:
        for _, source in given.models:
            source.entries = 0  # type: ignore[attr-defined]
        action()
        return sum(source.entries for _, source in given.models)  # type: ignore[attr-defined]

    one = read_by(lambda: alone(wanted[0], given, block=1000))
    assert one > 0
    assert read_by(lambda: together(wanted, given, block=1000)) == one


DENSITIES = (0.1, 0.25, 0.7)


@pytest.mark.parametrize(
    ("stage", "small"), [("ties", 0), ("ties per tensor", 0), ("breadcrumbs", 0), ("magnitude", 1 << 16)]
)
def test_cuts_of_all_variants_are_found_together(
    stage: str, small: int, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variant has the bytes of its own run, and magnitudes are counted as often for three variants as for two."""
    monkeypatch.setattr("weightsmith.kernels.cuts.SAMPLE", small)
    monkeypatch.setattr("weightsmith.core.task.KEPT", 5000)  # some tensors above it, some below
    calls = []
    add = Cells.add
    monkeypatch.setattr(Cells, "add", lambda self, *given: (calls.append(given), add(self, *given))[1])
    name, _, per_tensor = stage.partition(" ")
    more = {"scope": "tensor"} if per_tensor else {}
    wanted = [
        recipe([{name: {"density": d, **more}}, *([] if name == "ties" else ["task_arithmetic"])]) for d in DENSITIES
    ]
    expected = [alone(one, inputs) for one in wanted]
    often = []
    for some in (wanted[:2], wanted):
        calls.clear()
        assert together(some, inputs) == expected[: len(some)]
        often.append(len(calls))
    assert often[0] == often[1]
    assert bool(often[0]) == (small == 0 or stage == "ties")


def test_what_lambda_does_not_change_is_measured_once(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model-wide passes too, if what is known of the model is the same; where it differs they are not mixed up."""
    calls = []
    add = Merge.count_signs
    monkeypatch.setattr(Merge, "count_signs", lambda self, *given: (calls.append(given), add(self, *given))[1])
    wanted = [recipe("ties", parameters={"lambda": value}) for value in (0.1, 0.5, 0.9)]
    expected = [alone(one, inputs) for one in wanted]
    each = len(calls) // 3
    assert each > 0
    calls.clear()
    assert together(wanted, inputs) == expected
    assert len(calls) == each
    fewer = recipe("ties", exclude="*embed*")  # the same question of the same tensors, about another model
    assert together([wanted[0], fewer], inputs) == [expected[0], alone(fewer, inputs)]


@pytest.mark.parametrize("name", sorted(name for name, one in registered().items() if issubclass(one, Scaled)))
def test_a_decomposition_serves_all_factors(name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind a filter, or differs in more than its factor, is not mixed up with it; all are told the same."""
    calls, method, steps = [], registered()[name], {"iters": 2} if name in ("wudi", "optmerge") else {}
    merged = method.merged  # type: ignore[attr-defined]
    monkeypatch.setattr(method, "merged", lambda self, site: (calls.append(self), merged(self, site))[1])
    wanted = [recipe({name: steps | {"scaling": value}}) for value in (0.5, 1.0, 2.0)]
    wanted += [recipe([{"magnitude": {"density": density}}, {name: steps}]) for density in (0.3, 0.6)]
    expected = [alone(one, inputs) for one in wanted]
    each = len(calls) // len(wanted)
    assert each > 0
    calls.clear()
    jobs = [Job(make_plan(one, sources=inputs, threads=1), inputs, MemorySink()) for one in wanted]
    first, second, *_ = carry_out_all(jobs)
    assert [bits(job.sink) for job in jobs] == expected  # type: ignore[arg-type]
    assert len(calls) == 3 * each
    for task, record in first.items():
        assert record.get("told") == second[task].get("told")


# --- folders -----------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    for name in ("base", *EXPERTS):
        (tmp_path / name).mkdir()
        made = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(40, 30).bfloat16() for i in range(3)}
        save_file(made, tmp_path / name / "model.safetensors")
    listed = "".join(f"  {name}: ./{name}\n" for name in EXPERTS)
    (tmp_path / "r.yaml").write_text(f"base: ./base\nmodels:\n{listed}method: ties\n")
    return tmp_path


SETS = ["parameters.density=0.2,0.5", "models.e1.weight=1,2", "seed=7"]
FOLDERS = ["density=0.2,weight=1", "density=0.2,weight=2", "density=0.5,weight=1", "density=0.5,weight=2"]


def test_every_variant_is_the_folder_that_a_run_of_its_own_makes(models: Path, capsys: pytest.CaptureFixture) -> None:
    options = [word for text in SETS for word in ("--set", text)]
    assert main(["merge", str(models / "r.yaml"), str(models / "out"), *options, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["variants"]) == FOLDERS == sorted(p.name for p in (models / "out").iterdir())
    assert main(["merge", str(models / "r.yaml"), str(models / "out"), *options, "--overwrite"]) == 0
    assert f"; {size(shown['read_bytes'])} read for all of them together\n" in capsys.readouterr().out
    for name, one in load_variants(models / "r.yaml", SETS).items():
        run(one, models / "one" / name)
        made, wanted = models / "out" / name, models / "one" / name
        assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in wanted.iterdir())
        assert (made / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
        noted, expected = (json.loads((folder / "weightsmith.json").read_text()) for folder in (made, wanted))
        assert noted["recipe"] == expected["recipe"]
        assert noted["output"] == expected["output"]
        assert main(["verify", str(made), "--rerun"]) == 0


@pytest.mark.parametrize("at", ["merging", "publishing"])
def test_an_interrupted_sweep_goes_on(at: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_variants(models / "r.yaml", SETS)
    whole = run_sweep(wanted, models / "whole")
    finishing, calls = FolderSink.finishing, []

    def stop(done: int, total: int) -> None:
        if at == "merging" and done > 0.9 * total:  # behind three measuring passes
            raise KeyboardInterrupt

    def finish_one(self: FolderSink) -> AbstractContextManager[Path]:
        calls.append(self)
        if at == "publishing" and len(calls) == 3:
            raise KeyboardInterrupt
        return finishing(self)

    monkeypatch.setattr(FolderSink, "finishing", finish_one)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(wanted, models / "out", threads=1, progress=stop)
    there = sorted(p.name for p in (models / "out").iterdir())
    assert [name for name in there if "partial" not in name] == ([] if at == "merging" else FOLDERS[:2])
    assert any(name.endswith(".partial") for name in there)
    with pytest.raises(PlanError, match="--resume"):
        run_sweep(wanted, models / "out")
    calls.extend([None] * 9)
    run_sweep(wanted, models / "out", resume=True)
    assert sorted(p.name for p in (models / "out").iterdir()) == FOLDERS
    for name in whole.variants:
        made, expected = (models / folder / name / "model.safetensors" for folder in ("out", "whole"))
        assert made.read_bytes() == expected.read_bytes()


def test_the_plan_counts_inputs_once_and_outputs_each(models: Path, capsys: pytest.CaptureFixture) -> None:
    wanted = load_variants(models / "r.yaml", ["parameters.density=0.1,0.2,0.3"])
    alone = wanted["density=0.1"]
    swept, one = plan_sweep(wanted, models / "out"), make_plan(alone, sources=open_inputs(alone))
    assert swept.read_bytes == one.read_bytes
    assert swept.write_bytes == 3 * one.write_bytes
    assert one.peak_bytes < swept.room.peak_bytes < 1.3 * one.peak_bytes
    assert main(["plan", str(models / "r.yaml"), str(models / "out"), "--set", "parameters.density=0.1,0.2"]) == 0
    assert "in 2 folders" in capsys.readouterr().out
    assert not (models / "out").exists()


def test_problems_are_said_once_and_before_anything_is_written(models: Path) -> None:
    wanted = load_variants(models / "r.yaml", ["models.e1.layers=[0,1],[0,2]", "parameters.density=0.1,0.2"])
    with pytest.raises(PlanError, match=r"layers=_0_1_,density=0.1, layers=_0_1_,density=0.2: 2 tensors \(model"):
        run_sweep(wanted, models / "out")
    (models / "taken").mkdir()
    (models / "taken" / "config.json").write_text("{}")
    with pytest.raises(PlanError, match="taken is a model; the variants need a folder of their own"):
        run_sweep(load_variants(models / "r.yaml", ["seed=1,2"]), models / "taken")
    assert not (models / "out").exists()


def test_too_little_space_for_all_is_a_problem(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 0, 10_000))
    wanted = load_variants(models / "r.yaml", ["seed=1,2"])
    with pytest.raises(PlanError, match=r"2 variants need 0.00 GB in .*out, but 0.00 GB are free"):
        run_sweep(wanted, models / "out")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.density=0.1,0.2"], {"density=0.1": ("a.density=0.1",), "density=0.2": ("a.density=0.2",)}),
        (["a.d=[1,2]"], {"": ("a.d=[1,2]",)}),
        (["a.d=[1,2],3"], {"d=_1_2_": ("a.d=[1,2]",), "d=3": ("a.d=3",)}),
        (['out="a,b"'], {"": ('out="a,b"',)}),
        (["broken"], {"": ("broken",)}),
        (["a.w=1,2", "b.w=3, 4", "s=1"], {
            "a.w=1,b.w=3": ("a.w=1", "b.w=3", "s=1"), "a.w=1,b.w=4": ("a.w=1", "b.w=4", "s=1"),
            "a.w=2,b.w=3": ("a.w=2", "b.w=3", "s=1"), "a.w=2,b.w=4": ("a.w=2", "b.w=4", "s=1"),
        }),
        (["m=a/b,../c"], {"m=a_b": ("m=a/b",), "m=.._c": ("m=../c",)}),
    ],
)  # fmt: skip
def test_values_multiply(given: list[str], expected: dict[str, tuple[str, ...]]) -> None:
    assert expand(given) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["d=1,,2"], "an empty value in a list"),
        (["d=1,1"], "two variants would be called 'd=1'"),
        (["d=a/b,a:b"], "two variants would be called 'd=a_b'"),
        ([f"x{i}=1,2" for i in range(10)], "1024 variants; at most 1000"),
        ([f"d={'x' * 300},1"], "too long for a folder's name"),
    ],
)
def test_lists_that_cannot_be_meant(given: list[str], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        expand(given)


def test_verbs_that_make_one_thing_refuse_several_values(models: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(models / "out")
    assert main(["compress", str(models / "r.yaml"), out, "--set", "parameters.density=0.1,0.2"]) == 2
    assert "several values make a sweep, which merge and plan do" in capsys.readouterr().err
