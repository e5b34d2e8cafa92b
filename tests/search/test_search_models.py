"""Searches over small language models: Frank-Wolfe by a loss, built-in evaluators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tune.test_file import llama
from weightsmith.cli.main import main
from weightsmith.search.api import search

SEARCH = """\
recipe: {base: base, models: {math: math, code: code}, method: task_arithmetic}
sampler: {frank_wolfe: {granularity: layer, score: inner, step_size: 0.5, start: base}}
pool: {data: {math: math.jsonl, code: code.jsonl}, batch: 4, length: 24}
score: {bits_per_byte: {math: {search: math.txt, report: math2.txt}, code: {search: code.txt, report: code2.txt}}}
evaluations: 3
rescore: 0
"""


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = llama(0)
    for i, name in enumerate(("base", "math", "code")):
        model = base if name == "base" else llama(i, base)
        model.save_pretrained(folder / name)
        lines = [json.dumps({"text": f"{name} {j} " * 6}) for j in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        (folder / f"{name}.txt").write_text(f"{name} 1 2 3 " * 12)
        (folder / f"{name}2.txt").write_text(f"{name} 4 5 6 " * 12)
    (folder / "search.yaml").write_text(SEARCH)
    return folder


@pytest.mark.parametrize("local", ["task_arithmetic", "dare"])
def test_frank_wolfe_from_the_command_line(
    kitchen: Path, tmp_path: Path, local: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--set", f"sampler.frank_wolfe.local={local}"]
    assert main(["search", str(kitchen / "search.yaml"), str(tmp_path / "out"), "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == 3
    assert main(["merge", str(tmp_path / "out" / "recipe.yaml"), str(tmp_path / "merged")]) == 0
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()][1:]
    losses = [g["trials"][0]["point"]["loss before"] for g in history]
    assert losses[-1] < losses[0]
    assert not any("random" in line["name"] for line in found["table"])


@pytest.mark.parametrize("local", ["task_arithmetic", "ties"])
def test_frank_wolfe_goes_on_where_it_stopped(kitchen: Path, tmp_path: Path, local: str) -> None:
    file = kitchen / f"{local}.yaml"
    file.write_text(SEARCH.replace("start: base", f"start: base, local: {local}"))
    whole = search(file, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(text: str) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        search(file, tmp_path / "cut", say=stop)  # behind the first improvement
    again = search(file, tmp_path / "cut")
    assert [t.scores for t in again.search.trials] == [t.scores for t in whole.search.trials]
    assert [t.point for t in again.search.trials] == [t.point for t in whole.search.trials]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--set", "pool="], "add pool:"),
        (["--set", "sampler.frank_wolfe.local=ties", "--set", "evaluations=13"], "take at most 12 evaluations"),
        (["--set", "recipe.models={initial: math, code: code}"], "'initial' is what the start is called"),
        (["--set", "sampler.frank_wolfe.scor=cosine"], "did you mean 'score'"),
        (["--set", "space.weight=[0, 1]"], "leave space, members"),
        (["--set", "score.bits_per_byte.math.report=math.txt"], "is the data that is searched by"),
        (["--set", "score.bits_per_byte.math.report=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_faults(kitchen: Path, tmp_path: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(kitchen / "search.yaml"), str(tmp_path / "out"), *words]) == 2
    assert text in capsys.readouterr().err


def test_several_tasks_of_a_built_in_evaluator(kitchen: Path, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "recipe": {"base": str(kitchen / "base"), "models": {n: str(kitchen / n) for n in ("math", "code")},
                   "method": "task_arithmetic"},
        "space": {"weight": {"low": 0.0, "high": 1.0, "per": "model"}},
        "score": {"bits_per_byte": {n: {"search": str(kitchen / f"{n}.txt"), "report": str(kitchen / f"{n}2.txt")}
                                    for n in ("math", "code")}},
        "sampler": "random", "evaluations": 2, "rescore": 0, "controls": False,
    }  # fmt: skip
    made = search(tree, tmp_path / "out")
    assert made.search.aim.goals == {"math": "min", "code": "min"}
    best = min(made.search.trials, key=lambda t: sum((t.scores or {}).values()))
    assert made.best == best
