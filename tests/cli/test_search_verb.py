"""`weightsmith search` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from search.pantry import stocked, tree
from weightsmith.cli.main import main


@pytest.fixture
def pantry(tmp_path: Path) -> Path:
    stocked(tmp_path)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(tree(tmp_path, sampler="random", evaluations=4)))
    return tmp_path


def test_it_says_what_it_did(pantry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(pantry / "search.yaml"), str(pantry / "out")]) == 0
    said = capsys.readouterr().out
    for words in ("sampler random: 3 genes, 4 candidates", "resume: the same command goes on", "Held-out scores",
                  "best single expert", "cost: ", "next: "):  # fmt: skip
        assert words in said
    assert main(["merge", str(pantry / "out" / "recipe.yaml"), str(pantry / "merged")]) == 0


def test_json_is_json(pantry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(pantry / "search.yaml"), str(pantry / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == 4


def test_dry_run_scores_nothing(pantry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(pantry / "search.yaml"), str(pantry / "out"), "--dry-run"]) == 0
    assert "4 candidates" in capsys.readouterr().out
    assert not (pantry / "out").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--set", "sampler=tpee"], "unknown sampler 'tpee'; did you mean 'tpe'"),
        (["--set", "score.data.report=dev.txt"], "is the data that is searched by"),
        (["--set", "sampler={grid: {steps: 0}}"], "expected a whole number from 1 on"),
        (["--set", "sampler={tpe: {start: 3}}"], "unknown option 'start'; did you mean 'startup'"),
        (["--set", "recipe.models.d=nowhere/at/all"], "nowhere/at/all"),
        (["--set", "space.wieght=[0, 1]"], "did you mean 'weight'"),
        (["--set", "score.file=search.yaml"], "not a python file"),
        (["--set", "goals={near: max, a: max}", "--set", "sampler=cmaes"], None),
    ],
)
def test_faults_are_a_line(
    pantry: Path, words: list[str], text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["search", str(pantry / "search.yaml"), str(pantry / "out"), *words])
    found = capsys.readouterr().err
    if text is None:  # several goals and one number: their mean
        assert code == 0
        return
    assert code == 2
    assert text in found
    assert not (pantry / "out").exists()


def test_pick_needs_a_front(pantry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(pantry / "out")
    assert main(["search", "pick", out, "--prefer", "near=1"]) == 2
    assert "is the search finished?" in capsys.readouterr().err
    assert main(["search", str(pantry / "search.yaml"), out, "--quiet"]) == 0
    assert main(["search", "pick", out, "--prefer", "near=1"]) == 2
    assert "looked for one number" in capsys.readouterr().err
    assert main(["search", "pick", out]) == 2
    assert "--prefer math=2,code=1" in capsys.readouterr().err
