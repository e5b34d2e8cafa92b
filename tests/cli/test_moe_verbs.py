"""`weightsmith moe`: its verbs, the recipe without one, what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experts.mixture_models import IDS, logits, mixture_saved
from weightsmith.cli.main import main

ROWS = "\n".join(
    json.dumps({"text": text}) for text in ("a few words of text", "and some more of it", "numbers: 1 2 3")
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moe")
    mixture_saved(root / "m", "mixtral")
    (root / "t.jsonl").write_text(ROWS)
    words = ["observe", str(root / "m"), "--data", str(root / "t.jsonl"), "--out", str(root / "s"), "--stat", "routing"]
    assert main([*words, "--device", "cpu"]) == 0
    return root


def test_shrink_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["moe", "shrink", str(place / "m"), str(tmp_path / "out"), "--stats", str(place / "s"), "--keep", "0.75"]
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "6 of 8" in shown
    assert "reap: 12 of 16 experts in 2 layers, 2 per token" in shown
    assert main([*words, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [layer["experts"] for layer in told["layers"].values()] == [6, 6]
    assert told["bytes"] < told["model_bytes"]
    assert main(words) == 0
    assert torch.isfinite(logits(tmp_path / "out", IDS)).all()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--rerun"]) == 0
    assert main(["check", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert set(report["models"]) == {"merged", "model"}  # its perplexity beside the larger one's


def test_bad_words(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["moe", "shrink", str(place / "m"), str(tmp_path / "out"), "--stats", str(place / "s")]
    for more, said in (
        (["--experts", "9"], "9 experts of 8 are no fewer"),
        ([], "one of the two"),
        (["--experts", "6", "--by", "reep"], "did you mean 'reap'"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["moe", "shrink", str(tmp_path / "none"), str(tmp_path / "out"), "--stats", "x", "--keep", "0.5"]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_needs_no_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("base: nowhere\nexperts: {a: {model: nowhere, prompts: [x]}}\n")
    for words in (["moe"], ["moe", "build"]):
        assert main([*words, str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--dry-run"]) == 2
        assert "nowhere" in capsys.readouterr().err
    assert main(["moe", "--help"]) == 0
    assert "shrink" in capsys.readouterr().out


def test_calibrate_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["moe", "shrink", str(place / "m"), str(tmp_path / "small"), "--stats", str(place / "s"), "--experts", "6"]
    assert main([*words, "--quiet"]) == 0
    (tmp_path / "t.jsonl").write_text("\n".join([ROWS] * 3))
    words = ["moe", "calibrate", str(tmp_path / "small"), str(tmp_path / "out"), "--data", str(tmp_path / "t.jsonl")]
    capsys.readouterr()
    assert main([*words, "--steps", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["perplexity"]) == {"original", "before", "after"}
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(words) == 2
    assert "not empty" in capsys.readouterr().err
