"""The capacity page's figures: sizes, the formula, and how it is held against measurements."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from bench.capacity import MODELS, Llama, Planned, checked, hollow, node_rows, planned, seconds, time_rows
from bench.merges import MERGES

MOVING = Planned(read=30 * 10**9, written=10 * 10**9, peak=10**8, cpu=0.0, took=1.0)


@pytest.mark.parametrize(("name", "billions"), [("8B", 8.03), ("70B", 70.55), ("405B", 405.85)])
def test_models_have_the_sizes_of_their_names(name: str, billions: float) -> None:
    assert sum(key.numel for key in MODELS[name].tensors()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_hollow_checkpoint_is_planned_like_a_real_one(tmp_path: Path) -> None:
    model = Llama(layers=2, hidden=4096, inner=8192)
    folders = [hollow(tmp_path / name, model) for name in ("base", "a", "b", "c")]
    nbytes = sum(key.nbytes for key in model.tensors())
    assert sum(path.stat().st_size for path in folders[0].glob("*.safetensors")) > nbytes
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*")) < 1e6
    found = planned(MERGES["task_arithmetic"].recipe(tmp_path / "recipe.json", folders[0], folders[1:]))
    assert (found.read, found.written) == (4 * nbytes, nbytes)
    assert 0 < found.peak < 10**9
    assert found.cpu > 0


def test_the_slower_of_moving_and_calculating_counts() -> None:
    assert seconds(MOVING, 1e9, 1000) == pytest.approx(40)
    assert seconds(MOVING, 1e12, 1) == pytest.approx(0.2 * 30 + 0.8 * 10)
    busy = Planned(MOVING.read, MOVING.written, MOVING.peak, cpu=1000.0, took=1.0)
    assert seconds(busy, 1e9, 8) == pytest.approx((1000 + 14) / 8)
    assert seconds(busy, 1e9, 16) == pytest.approx((1000 + 14) / 16)
    assert not math.isclose(seconds(busy, 1e9, 16), seconds(busy, 1e9, 8))


def test_tables() -> None:
    busy = Planned(MOVING.read, MOVING.written, MOVING.peak, cpu=3200.0, took=1.0)
    (_, row), (_, nodes) = time_rows({("8B", "ties"): MOVING}), node_rows({("8B", "ties"): busy})
    assert row[:5] == ["8B", "ties", "30", "10", "0.1"]
    assert row[5] == "3 min"
    assert nodes[2:4] == ["7 min", "3 min"]
    assert nodes[-1] == "101 nodes"  # (3200 + 14) / 8 / 4 s

    runs = [
        {"merge": "ties", "program": program, "usage": {"wall": wall}}
        for program, wall in (("weightsmith", 20.0), ("copy", 10.0), ("copy", 8.0))
    ]
    (_, row) = checked({"runs": runs}, {"ties": MOVING, "never measured": MOVING}, 2)
    assert row == ["ties", "5.0", "9.0", "20.0", "2.22"]
