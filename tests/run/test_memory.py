"""Predicted against measured memory, in processes of their own.  Large tensors: tests/torture/torture_memory.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from run.peaks import STATISTICS, count_for, methods, spec, stages_for
from weightsmith.core.keys import Key
from weightsmith.core.method import Codec, Grain
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import ModelRef, Recipe

ROOT = Path(__file__).parent.parent.parent
PEAKS = Path(__file__).with_name("peaks.py")
BELOW, NEAR = 0.95, 1.25
"""Bounds of predicted / measured: the measured peak of a process moves by some percent with its allocator's mood."""
LLVMLITE = 57_000_000
"""What every process held when the bound on growth was set; without it the growth allowed stays the same in bytes."""
MATRIX = "model.layers.0.mlp.up_proj.weight"


def measured(rows: int, columns: int, experts: int, names: list[str]) -> dict[str, float]:
    """Method -> predicted / measured."""
    command = [sys.executable, str(PEAKS), str(rows), str(columns), str(experts), *names]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in shown.splitlines()]
    return {name: int(predicted) / int(peak) for name, predicted, peak, _ in lines}


def far(found: dict[str, float]) -> dict[str, float]:
    """Those of which the prediction is not near."""
    return {name: round(ratio, 2) for name, ratio in found.items() if not BELOW < ratio < NEAR}


@pytest.mark.parametrize("half", [0, 1])
def test_predicted_peaks_of_all_methods_are_near(half: int) -> None:
    """Square matrices of a few megabytes: blocks for elementwise methods, whole tensors for the others."""
    names = methods()[half::2]
    found = measured(640, 640, 3, names)
    assert list(found) == names
    assert far(found) == {}


def test_decompositions_hold_one_expert_at_a_time() -> None:
    assert far(measured(512, 512, 48, ["tsvm", "iso_c"])) == {}


# --- what is planned, for every method ---------------------------------------------------------------


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bf16 file of zeros that takes no space."""
    end, header = 0, {}
    for name, shape in shapes.items():
        key = Key(name, shape, "bfloat16")
        end, start = end + key.nbytes, end
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def planned(folder: Path, name: str, shapes: dict[str, tuple[int, ...]], experts: int, **how: Any) -> Plan:
    """The plan of one method; an expert's statistics are its own file's, or Gram matrices beside it."""
    if not folder.exists():
        sparse(folder / "model" / "model.safetensors", shapes)
        for stat in STATISTICS:
            squares = {n: (s[1], s[1]) if stat == "gram" and len(s) == 2 else s for n, s in shapes.items()}
            sparse(folder / stat / "model.safetensors", squares)
    model, stats = open_source(folder / "model"), {s: open_source(folder / s) for s in STATISTICS}
    stages = stages_for(name)
    names = [f"e{i}" for i in range(count_for(name, experts))]
    recipe = Recipe(
        base=ModelRef(model="base"),
        models={n: ModelRef(model=n) for n in names},
        method=tuple(map(spec, stages)),
    )
    found = {stat: dict.fromkeys(names, source) for stat, source in stats.items()}
    inputs = Inputs(model, dict.fromkeys(names, model), found)
    return make_plan(recipe, sources=inputs, encode=isinstance(stages[-1], Codec), strict=False, **how)


ELEMENT = [n for n in methods() if all(s.grain is Grain.ELEMENT for s in stages_for(n))]


@pytest.mark.parametrize("name", methods())
def test_a_budget_is_kept_or_refused_with_the_least_that_works(name: str, tmp_path: Path) -> None:
    shapes = {MATRIX: (512, 512), MATRIX.replace("up", "down"): (512, 512)}
    free = planned(tmp_path / "m", name, shapes, 3, threads=2)
    assert free.problems == ()
    least = free.room.task_bytes
    tight = planned(tmp_path / "m", name, shapes, 3, threads=2, memory=least)
    assert (tight.problems, tight.threads) == ((), 1)
    assert tight.peak_bytes <= least
    (text,) = planned(tmp_path / "m", name, shapes, 3, threads=2, memory=least // 2).problems
    (said,) = re.findall(r"--memory \d+ MB is too little: \S+ alone needs ([\d,]+) MB", text.text)
    assert (
        planned(tmp_path / "m", name, shapes, 3, threads=2, memory=int(said.replace(",", "")) * 1_000_000).problems
        == ()
    )


@pytest.mark.parametrize("name", ELEMENT)
def test_elementwise_plans_are_flat_in_sizes_experts_and_layers(name: str, tmp_path: Path) -> None:
    embed, some = "model.embed_tokens.weight", {MATRIX: (64, 64)}
    small = planned(tmp_path / "small", name, {embed: (4096, 1024), **some}, 3, threads=1)
    large = planned(tmp_path / "large", name, {embed: (131_072, 8192), **some}, 3, threads=1)
    assert large.problems == ()
    assert large.peak_bytes < 1.25 * small.peak_bytes
    layers = {MATRIX.replace("0", str(i)): (4096, 1024) for i in range(40)}
    assert planned(tmp_path / "deep", name, layers, 3, threads=1).peak_bytes < 1.25 * small.peak_bytes
    for experts in (12, 48):
        many = planned(tmp_path / "deep", name, layers, experts, threads=1)
        assert many.peak_bytes + LLVMLITE < 1.6 * (small.peak_bytes + LLVMLITE), experts


# --- whole processes ---------------------------------------------------------------------------------


LAYERS: dict[str, tuple[int, ...]] = {f"model.layers.{i}.mlp.up_proj.weight": (1024, 1024) for i in range(4)}


@pytest.mark.parametrize(
    ("shapes", "experts", "method"),
    [
        (LAYERS, 48, "task_arithmetic"),
        ({"model.embed_tokens.weight": (16_000, 2048)}, 3, "ties"),
        (LAYERS, 12, "multislerp"),
    ],
)
def test_whole_processes_are_flat_in_experts_and_sizes(
    shapes: dict[str, tuple[int, ...]], experts: int, method: str, tmp_path: Path
) -> None:
    predicted, used = whole_process(shapes, experts, method, tmp_path)
    assert predicted < 400_000_000
    assert 1 / NEAR < predicted / used < NEAR


def whole_process(shapes: dict[str, tuple[int, ...]], experts: int, method: str, folder: Path) -> tuple[int, int]:
    """Bytes that the command line's plan predicts, and that its merge takes."""
    names = ["base", *(f"e{i}" for i in range(experts))]
    for name in names:
        sparse(folder / name / "model.safetensors", shapes)
    recipe = {"base": "./base", "models": {n: f"./{n}" for n in names[1:]}, "method": method}
    (folder / "r.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "weightsmith"]
    plan = subprocess.run(
        [*command, "plan", str(folder / "r.json"), "--json"], check=True, capture_output=True, text=True
    )
    # Started by a small process: Linux begins a child's peak with that of the process it was forked from.
    launch = [sys.executable, str(ROOT / "bench" / "launch.py"), str(folder / "used"), str(folder / "log")]
    subprocess.run([*launch, *command, "merge", str(folder / "r.json"), str(folder / "out"), "--quiet"], check=True)
    used = json.loads((folder / "used").read_text())
    assert used["code"] == 0, (folder / "log").read_text()
    return json.loads(plan.stdout)["peak_bytes"], used["rss"]
