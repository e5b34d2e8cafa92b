"""The study of training's parts: figures are kept, tables are means over seeds, the picture is a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from study.train.cells import Room, searched, table
from study.train.styles import write_png
from study.train.tasks import TASKS, steps


def test_figures_are_measured_once(tmp_path: Path) -> None:
    room, asked = Room(tmp_path, tmp_path / "home"), []

    def measure(rate: float, seed: int) -> dict[str, float]:
        asked.append((rate, seed))
        return {"loss": abs(rate - 0.2) + seed}

    for _ in range(2):
        found = searched(room, "part/way", (0.1, 0.2, 0.4), measure, (0, 1), "loss")
        assert [one["loss"] for one in found] == [0, 1]
    assert asked == [(0.1, 0), (0.2, 0), (0.4, 0), (0.2, 1)]
    lines = table("loss", {"way": found, "one": found[:1]}, ("loss",)).splitlines()
    assert lines[2:] == ["| way | 0.500 (0.707) |", "| one | 0.000 |"]


def test_batches_hold_one_task_or_several() -> None:
    data = {task: [(task, task, float(i)) for i in range(60)] for task in TASKS}
    single, mixed = steps(data, True, 0), steps(data, False, 0)
    assert {len(single(step)) for step in range(6)} == {1}
    assert all(row[0] == task for step in range(6) for task, rows in single(step).items() for row in rows)
    assert any(len(mixed(step)) > 1 for step in range(3))


def test_a_picture_is_written(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.arange(12, dtype=torch.uint8).view(3, 4))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
