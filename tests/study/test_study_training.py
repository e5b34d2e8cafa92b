"""The study's own family: data sets from a folder, disjoint parts, frozen heads, experts that stop in time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the checkout, not installed

from study.data import LENSES, SIDE, load
from study.vision import Training, accuracies, train

SMALL = Training(width=16, blocks=1, base_steps=4, base_batch=4, expert_steps=30, expert_batch=8, expert_rate=1e-3,
                 joint_steps=2, observed=8)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One data set in colour, and one file of four in grey with different writers."""
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "Shapes.npz", x_train=draw.integers(0, 256, (40, 20, 20, 3), np.uint8),
             y_train=np.arange(40) % 4,
             x_test=draw.integers(0, 256, (12, 20, 20, 3), np.uint8), y_test=np.arange(12) % 4)  # fmt: skip
    several = {}
    for number, name in enumerate(("Aa", "B_(b)", "C", "D")):
        several[f"{name}/x"] = draw.integers(0, 256, (100 + 20 * number, 32, 32), np.uint8)
        several[f"{name}/y"] = np.arange(100 + 20 * number) % 5 + 3
        several[f"{name}/drawer"] = np.arange(100 + 20 * number) // 5 % 20 + 1
    np.savez(tmp_path / "letters.npz", **several)
    return tmp_path


def test_a_folder_of_data_sets(folder: Path) -> None:
    data = load(folder)
    assert [task.name for task in data.tasks] == ["b-b", "c", "d", "digits"]
    assert [task.name for task in data.guards] == ["aa", "shapes"]  # the smallest
    assert {task.name for task in data.all} == {"aa", "b-b", "c", "d", "digits", "shapes"}
    for task in data.all:
        for split in task.splits.values():
            assert split.images.shape[1:] == (3, SIDE, SIDE)
            assert 0 <= float(split.images.min()) <= float(split.images.max()) <= 1
            assert set(split.labels.tolist()) <= set(range(task.classes))
    letters = next(task for task in data.all if task.name == "c")
    assert [len(letters.splits[s].labels) for s in ("train", "validation", "test")] == [100, 15, 25]


def test_the_parts_of_a_data_set_share_no_image(folder: Path) -> None:
    for task in load(folder).all:
        if task.name == "digits":
            continue  # some of its 1,797 images are equal
        seen = [{image.numpy().tobytes() for image in split.images} for split in task.splits.values()]
        assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])


def test_without_a_folder_there_are_eight_lenses() -> None:
    data = load(None)
    assert len(data.tasks) == 8
    assert {task.name for task in data.all} == set(LENSES)
    first = [task.splits["test"].images[0] for task in data.all]
    assert all(not torch.equal(a, b) for at, a in enumerate(first) for b in first[:at])


@pytest.mark.parametrize(("files", "message"), [({}, "no .npz files"), ({"x": np.zeros(3)}, "needed: x_train")])
def test_a_folder_without_images(tmp_path: Path, files: dict[str, np.ndarray], message: str) -> None:
    if files:
        np.savez(tmp_path / "odd.npz", **files)
    with pytest.raises(SystemExit, match=message):
        load(tmp_path)


def test_experts_share_the_heads_and_stop_in_time(folder: Path, tmp_path: Path) -> None:
    data = load(folder)
    out = tmp_path / "models"
    out.mkdir()
    train(out, data, 0, SMALL, lambda text: None)
    base = load_file(out / "base.safetensors")
    story = json.loads((out / "moved.json").read_text())
    assert set(story) == {task.name for task in data.tasks} | {"joint"}
    for task in data.tasks:
        expert = load_file(out / f"{task.name}.safetensors")
        changes = {name for name in base if not torch.equal(base[name], expert[name])}
        assert changes == {name for name in base if not name.startswith("heads.")}
        norm = sum(float(base[n].double().square().sum()) for n in changes) ** 0.5
        change = sum(float((expert[n] - base[n]).double().square().sum()) for n in changes) ** 0.5
        assert change / norm == pytest.approx(story[task.name]["moved"], rel=1e-5)
        assert SMALL.displacement <= story[task.name]["moved"] < 2 * SMALL.displacement
        assert {file.name for file in (out / "stats" / task.name).iterdir()} == {
            "gram.safetensors",
            "fisher.safetensors",
        }
    scores = accuracies(out / "base.safetensors", data, "test", SMALL)
    assert set(scores) == {task.name for task in data.all}
    assert all(0 <= score <= 100 for score in scores.values())
