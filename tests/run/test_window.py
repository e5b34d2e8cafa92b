"""Averages of a run's checkpoints by their steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError
from weightsmith.jobs.window import WINDOWS, steps_in, weights, window


def run_of(folder: Path, steps: list[int], width: int = 4) -> Path:
    """Checkpoints whose weights are their steps."""
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"w": np.full((3, width), float(step), np.float32)}, folder / f"checkpoint-{step}/model.safetensors")
    return folder


@pytest.mark.parametrize("kind", WINDOWS)
def test_weights_sum_to_one_and_equal_a_falling_learning_rate(kind: str) -> None:
    steps = [100, 200, 300, 450, 500]
    found = weights(steps, kind)
    assert math.fsum(found) == pytest.approx(1)
    assert all(w >= 0 for w in found)
    if kind in ("uniform", "ema"):
        return
    # theta = theta_0 + sum of updates, each scaled by what is left of the rate when it ends
    left = {"linear": lambda s: 1 - s, "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
            "minus-sqrt": lambda s: 1 - math.sqrt(s)}[kind]  # fmt: skip
    updates = np.random.default_rng(0).standard_normal(5)
    thetas = np.cumsum(updates)
    begins = [(t - 0) / 500 for t in (0, *steps[:-1])]
    falling = math.fsum(u * left(s) for u, s in zip(updates, begins, strict=True))
    assert float(np.dot(found, thetas)) == pytest.approx(falling)


def test_closed_forms() -> None:
    assert weights([1, 2, 3, 4], "linear") == pytest.approx([0.25] * 4)
    assert weights([10, 20, 30, 40], "minus-sqrt") == pytest.approx(
        [math.sqrt(i / 4) - math.sqrt((i - 1) / 4) for i in (1, 2, 3, 4)]
    )
    assert weights([1, 2, 3], "ema", 0.5) == pytest.approx([0.25, 0.25, 0.5])
    assert weights([7], "cosine") == [1.0]


@pytest.mark.parametrize(
    ("steps", "kind", "decay", "text"),
    [([1, 1], "uniform", 0.9, "one step"), ([], "uniform", 0.9, "no checkpoint"), ([1], "cosin", 0.9, "cosine"),
     ([1, 2], "ema", 1.0, "outside")],
)  # fmt: skip
def test_what_cannot_be(steps: list[int], kind: str, decay: float, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        weights(steps, kind, decay)


def test_folders_recipes_and_the_last_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "run", [500, 1000, 1500, 2000])
    (folder / "runs").mkdir()
    assert list(steps_in(folder)) == [500, 1000, 1500, 2000]
    assert main(["soup", str(folder), str(tmp_path / "out"), "--window", "ema", "--last", "2", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert load_file(tmp_path / "out/model.safetensors")["w"][0, 0] == pytest.approx(0.9 * 1500 + 0.1 * 2000)
    file = tmp_path / "run.yaml"
    file.write_text(f"models: {{late: {folder}/checkpoint-2000, early: {folder}/checkpoint-500}}\nmethod: linear\n")
    assert list(window(file, "uniform").models) == ["early", "late"]
    assert main(["soup", str(folder), str(tmp_path / "o"), "--window", "linear", "--size", "2"]) == 2
    assert "leave out" in capsys.readouterr().err
    (folder / "step_2000").mkdir()
    assert main(["soup", str(folder), str(tmp_path / "o"), "--window", "linear"]) == 2
    assert "both of step 2000" in capsys.readouterr().err


def test_checkpoints_of_distributed_training(tmp_path: Path) -> None:
    import warnings

    import torch.distributed.checkpoint as dcp

    for step in (10, 20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": {"w": torch.full((2, 2), float(step))}}, checkpoint_id=tmp_path / "run" / f"step-{step}",
                     no_dist=True)  # fmt: skip
    assert main(["soup", str(tmp_path / "run"), str(tmp_path / "out"), "--window", "uniform", "--quiet"]) == 0
    assert load_file(tmp_path / "out/model.safetensors")["w"][0, 0] == 15


def test_memory_does_not_grow_with_the_window(tmp_path: Path) -> None:
    """Peak memory of a process that averages 4, and 200, checkpoints."""
    run_of(tmp_path / "run", list(range(1, 201)), width=60_000)
    peaks = []
    for count in (4, 200):
        code = (
            "import resource, sys\nfrom weightsmith.cli.main import main\n"
            f"assert main(['soup', {str(tmp_path / 'run')!r}, {str(tmp_path / f'out{count}')!r}, '--window', 'cosine', "
            f"'--last', '{count}', '--quiet', '--threads', '1']) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks
