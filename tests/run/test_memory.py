"""Predicted against measured memory, in processes of their own.  All methods: tests/torture/torture_memory.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from run.peaks import methods

ROOT = Path(__file__).parent.parent.parent
PEAKS = Path(__file__).with_name("peaks.py")
SAMPLE = ["task_arithmetic", "ties", "dare", "breadcrumbs", "arcee_fusion", "slerp", "regmean", "widen", "tall_masks"]
NEAR = 1.25


def measured(rows: int, experts: int, names: list[str]) -> dict[str, float]:
    """Method -> predicted / measured."""
    command = [sys.executable, str(PEAKS), str(rows), str(experts), *names]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in shown.splitlines()]
    return {name: int(predicted) / int(peak) for name, predicted, peak, _ in lines}


def test_the_sample_is_of_registered_methods() -> None:
    assert set(SAMPLE) <= set(methods())


def test_predicted_peaks_are_near() -> None:
    """Square matrices of a megabyte and more: blocks for elementwise methods, whole tensors for the others."""
    found = measured(1024, 3, SAMPLE)
    assert list(found) == SAMPLE
    assert {n: round(r, 2) for n, r in found.items() if not 1 / NEAR < r < NEAR} == {}


def sparse(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A bf16 file of zeros that takes no space."""
    end, header = 0, {}
    for name, (rows, columns) in shapes.items():
        end, start = end + 2 * rows * columns, end
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


LAYERS = {f"model.layers.{i}.mlp.up_proj.weight": (1024, 1024) for i in range(4)}


@pytest.mark.parametrize(
    ("shapes", "experts", "method"),
    [
        (LAYERS, 48, "task_arithmetic"),
        ({"model.embed_tokens.weight": (16_000, 2048)}, 3, "ties"),
        (LAYERS, 12, "multislerp"),
    ],
)
def test_whole_processes_are_flat_in_experts_and_sizes(
    shapes: dict[str, tuple[int, int]], experts: int, method: str, tmp_path: Path
) -> None:
    names = ["base", *(f"e{i}" for i in range(experts))]
    for name in names:
        sparse(tmp_path / name / "model.safetensors", shapes)
    recipe = {"base": "./base", "models": {n: f"./{n}" for n in names[1:]}, "method": method}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "weightsmith"]
    planned = subprocess.run(
        [*command, "plan", str(tmp_path / "r.json"), "--json"], check=True, capture_output=True, text=True
    )
    predicted = json.loads(planned.stdout)["peak_bytes"]
    # Started by a small process: Linux begins a child's peak with that of the process it was forked from.
    launch = [sys.executable, str(ROOT / "bench" / "launch.py"), str(tmp_path / "used"), str(tmp_path / "log")]
    subprocess.run([*launch, *command, "merge", str(tmp_path / "r.json"), str(tmp_path / "out"), "--quiet"], check=True)
    used = json.loads((tmp_path / "used").read_text())
    assert used["code"] == 0, (tmp_path / "log").read_text()
    assert predicted < 400_000_000
    assert 1 / NEAR < predicted / used["rss"] < NEAR
