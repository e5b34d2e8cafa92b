"""`weightsmith soup`: constant models whose merges score as their distance to a wanted constant says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from weightsmith.cli.main import main

SCORE = """
import sys
from pathlib import Path
from safetensors.numpy import load_file

folder = Path(sys.argv[1])
value = float(load_file(folder / "model.safetensors")["w"][0])
with open(sys.argv[2], "a") as log:
    log.write(f"{value:g}\\n")
print("a line for people")
print(abs(value - 2.0) * float(sys.argv[3]))
"""


@pytest.fixture
def kitchen(tmp_path: Path) -> Path:
    """Models of constant 1, 4, 2.5 and 9; the nearer a merge is to 2, the better."""
    for name, value in (("one", 1.0), ("four", 4.0), ("near", 2.5), ("far", 9.0)):
        (tmp_path / name).mkdir()
        save_file({"w": np.full(4, value, np.float32)}, tmp_path / name / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text("models: {one: one, four: four, near: near, far: far}\nmethod: linear\n")
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def command(kitchen: Path, factor: float = 1.0, where: str = "{}") -> str:
    return f"{sys.executable} {kitchen / 'score.py'} {where} {kitchen / 'log'} {factor}"


def merged(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["w"][0])


def soup(kitchen: Path, *words: str) -> int:
    return main(["soup", str(kitchen / "recipe.yaml"), str(kitchen / "out"), *words])


def test_greedy_takes_what_is_better_together(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soup(kitchen, "--score-command", command(kitchen), "--lower-is-better", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    # alone: 1, 2, 0.5, 7.  near; near and one 1.75: 0.25; with four 2.5: worse; with far: worse.
    assert said["models"] == ["one", "near"]
    assert said["score"] == pytest.approx(0.25)
    assert [(t["models"][-1], t["kept"]) for t in said["trials"]] == [
        ("near", True), ("one", True), ("four", False), ("far", False)
    ]  # fmt: skip
    assert merged(kitchen / "out") == 1.75
    assert sorted(p.name for p in kitchen.glob("out*")) == ["out", "out.scores.jsonl"]
    assert len((kitchen / "log").read_text().split()) == 7


def test_higher_is_better_by_itself(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soup(kitchen, "--score-command", command(kitchen, -1.0)) == 0
    assert "2 models, one, near, score -0.25" in capsys.readouterr().out
    assert merged(kitchen / "out") == 1.75


def test_nothing_is_scored_twice(kitchen: Path) -> None:
    words = ("--score-command", command(kitchen), "--lower-is-better", "--quiet", "--overwrite")
    assert soup(kitchen, *words) == 0
    before = (kitchen / "log").read_text()
    assert soup(kitchen, *words) == 0
    assert (kitchen / "log").read_text() == before
    save_file({"w": np.full(4, 1.25, np.float32)}, kitchen / "one" / "model.safetensors")
    assert soup(kitchen, *words) == 0
    assert (kitchen / "log").read_text() != before, "another model wants another score"


def test_given_scores_save_the_first_round(kitchen: Path) -> None:
    (kitchen / "scores.json").write_text('{"one": 1, "four": 2, "near": 0.5, "far": 7}')
    words = ("--score-command", command(kitchen), "--lower-is-better", "--scores", str(kitchen / "scores.json"))
    assert soup(kitchen, *words) == 0
    assert (kitchen / "log").read_text().split() == ["1.75", "2.5", "4.16667"]
    assert merged(kitchen / "out") == 1.75


@pytest.mark.parametrize(
    ("words", "wanted"),
    [((), 4.125), (("--scores", "--size", "2"), 6.5), (("--scores", "--size", "2", "--lower-is-better"), 1.75)],
)
def test_uniform_and_best_few(kitchen: Path, words: tuple[str, ...], wanted: float) -> None:
    (kitchen / "scores.json").write_text('{"one": 1, "four": 2, "near": 0.5, "far": 7}')
    given = [part for w in words for part in ([w, str(kitchen / "scores.json")] if w == "--scores" else [w])]
    assert soup(kitchen, *given) == 0
    assert merged(kitchen / "out") == wanted


@pytest.mark.parametrize(
    ("words", "scores", "text"),
    [
        (["--scores"], '{"one": 1, "four": 2, "near": 1, "far": 1}', "do not say how many are better together"),
        (["--scores", "--size", "2"], '{"one": 1}', "no score is given for 'far'"),
        (["--scores", "--size", "2"], '{"one": 1, "four": 2, "near": 1, "far": 1, "neat": 1}', "did you mean 'near'"),
        (["--scores", "--size", "9"], '{"one": 1, "four": 2, "near": 1, "far": 1}', r"size = 9 is outside \[1, 4\]"),
        (["--scores"], "[1]", "should be a mapping"),
        (["--scores"], '{"one": "good"}', "the score of 'one' is 'good', not a number"),
        (["--scores"], "{", "no JSON"),
        (["--size", "2"], "", "size = 2 of 4 models needs a score of each"),
        (["--score-command", "'"], "", '--score-command "\'": No closing quotation'),
        (["--score-command", " "], "", "--score-command is empty"),
        (["--score-command", "no-such-program {}"], "", "No such file or directory"),
        (["--score-command", "false"], "", "ended with code 1 on "),
        (["--score-command", "echo good"], "", "should be a number, is 'good "),
        (["--score-command", "echo", "--size", "2"], "", "the greedy soup finds out itself"),
    ],
)
def test_bad_input(kitchen: Path, words: list[str], scores: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (kitchen / "scores.json").write_text(scores)
    given = [part for w in words for part in ([w, str(kitchen / "scores.json")] if w == "--scores" else [w])]
    assert soup(kitchen, *given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert re.search(text, said), said
    assert not list(kitchen.glob("out*/*"))
    assert not list(kitchen.glob("out.trial*"))


def test_a_full_folder_is_seen_before_anything_is_scored(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kitchen / "out").mkdir()
    (kitchen / "out" / "mine.txt").write_text("kept")
    assert soup(kitchen, "--score-command", command(kitchen)) == 2
    assert "not empty" in capsys.readouterr().err
    assert not (kitchen / "log").exists()
    assert [p.name for p in (kitchen / "out").iterdir()] == ["mine.txt"]
