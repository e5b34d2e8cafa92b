"""A study from its file to its figures: `weightsmith bench` on three points around one base."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_family import EVALUATOR, STUDY, calls, make, save

from weightsmith.cli.main import main
from weightsmith.core.errors import NumericError, OutputError
from weightsmith.io.write.lock import FolderLock
from weightsmith.study import run
from weightsmith.study.bench import Result, bench
from weightsmith.study.schema import load_study
from weightsmith.study.show import in_words, main_table

Captured = pytest.CaptureFixture[str]


def measured(folder: Path, out: Path, **options: Any) -> Result:
    (result,) = bench([load_study(folder)], out, evaluator=folder / "score.py", **options)
    return result


def test_figures_by_hand(tmp_path: Path) -> None:
    make(tmp_path)
    result = measured(tmp_path, tmp_path / "out")
    rows = {row.name: row for row in result.rows}
    assert list(rows) == [
        "base",
        "expert red",
        "expert green",
        "expert blue",
        "joint training",
        "average",
        "sum",
        "TIES",
    ]
    assert rows["base"].tasks == pytest.approx({"red": 96.0, "green": 96.0, "blue": 96.0}, abs=1e-4)
    assert rows["expert red"].tasks["red"] == 100.0
    assert rows["expert red"].tasks["blue"] == pytest.approx(100 - 32**0.5, abs=1e-4)
    third = 4 * (4 / 9 + 2 / 9 * 0.5) ** 0.5  # the average is 2/3 of a step short of each, 1/3 too far twice
    distance = 4 * ((2 / 3) ** 2 + 2 * (1 / 3) ** 2) ** 0.5
    assert third < distance
    average = rows["average"]
    assert average.score == pytest.approx(100 - distance, abs=1e-4)
    assert average.normalised == pytest.approx(1 - distance / 100, abs=1e-6)
    assert average.gain_kept == pytest.approx(1 - distance / 4, abs=1e-5)
    assert average.forgetting == pytest.approx(4 / 3**0.5, abs=1e-4)  # on grey, which is the base itself
    assert average.spread is None
    assert average.chosen == ""
    assert average.peak_bytes
    norm = sum(float((array**2).sum()) for array in _tensors(tmp_path / "base.safetensors")) ** 0.5
    assert rows["expert blue"].moved == pytest.approx(4 / norm, rel=1e-5)


def test_coefficients_are_chosen_on_validation_and_never_on_test(tmp_path: Path) -> None:
    make(tmp_path, validation=0.25)  # on test, lambda 1 would be worst and 0.25 not best for every task
    result = measured(tmp_path, tmp_path / "out", methods=["sum"])
    assert result.tried["sum"]["lambda 0.25"] == pytest.approx(100.0, abs=1e-4)
    assert result.of("merge")[0].chosen == "lambda 0.25"
    other = tmp_path / "other"
    make(other, validation=1.0)
    (row,) = measured(other, other / "out", methods=["sum"]).of("merge")
    assert row.chosen == "lambda 1"
    assert row.defaults == row.normalised, "lambda 1 is the default"
    assert result.of("merge")[0].defaults < result.of("merge")[0].normalised  # type: ignore[operator]
    assert ("below the base with their defaults: sum" in in_words(result)) == (
        result.of("merge")[0].defaults < result.of("base")[0].normalised  # type: ignore[operator]
    )
    # base, three experts and joint training, the one choice, the defaults; each of the three candidates on validation
    assert (calls(other).count("test"), calls(other).count("validation")) == (7, 3)


def test_nothing_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    first = measured(tmp_path, tmp_path / "out")
    before = calls(tmp_path)
    monkeypatch.setattr(run, "run", None)  # a merge would fail
    assert measured(tmp_path, tmp_path / "out") == first
    assert calls(tmp_path) == before
    assert not (tmp_path / "out" / "merged").exists()


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    whole = measured(tmp_path, tmp_path / "whole")
    done = len(calls(tmp_path))
    merge, left = run.run, [3]

    def killed(*args: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return merge(*args, **named)

    monkeypatch.setattr(run, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, tmp_path / "out")
    monkeypatch.setattr(run, "run", merge)
    again = measured(tmp_path, tmp_path / "out")
    assert [row.tasks for row in again.rows] == [row.tasks for row in whole.rows]
    assert len(calls(tmp_path)) == 2 * done


def test_models_of_equal_name_size_and_time_are_told_apart(tmp_path: Path) -> None:
    folders = STUDY.replace(".safetensors", "")
    make(tmp_path, text=folders[: folders.index("joint:")] + folders[folders.index("guards:") :])
    for name in ("base", "red", "green", "blue"):
        (tmp_path / name).mkdir()
        moved = (tmp_path / f"{name}.safetensors").rename(tmp_path / name / "model.safetensors")
        os.utime(moved, (1, 1))
    rows = {row.name: row for row in measured(tmp_path, tmp_path / "out", methods=["average"]).rows}
    assert rows["base"].tasks["red"] == pytest.approx(96.0, abs=1e-4)
    assert rows["expert red"].tasks["red"] == 100.0
    assert rows["expert blue"].tasks["blue"] == 100.0


def test_an_expert_that_is_a_recipe_is_made_before_it_is_scored(tmp_path: Path) -> None:
    nested = "{models: {a: red.safetensors, b: green.safetensors}, method: linear}"
    text = STUDY.replace("red: red.safetensors", f"red: {nested}").replace("joint: joint.safetensors", "")
    make(tmp_path, text=text)
    rows = {row.name: row for row in measured(tmp_path, tmp_path / "out", methods=["average"]).rows}
    assert rows["expert red"].tasks["red"] == pytest.approx(100 - 8**0.5, abs=1e-4)  # half way to each
    assert rows["expert red"].tasks["green"] == pytest.approx(100 - 8**0.5, abs=1e-4)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    lock = FolderLock(tmp_path / "scores.lock", tmp_path)
    lock.acquire()
    try:
        with pytest.raises(OutputError, match="is in use by process"):
            measured(tmp_path, tmp_path)
    finally:
        lock.release()
    assert measured(tmp_path, tmp_path, methods=["average"]).of("merge")
    assert not (tmp_path / "scores.lock").exists()


@pytest.mark.parametrize("what", ["evaluator", "weights", "arguments"])
def test_what_scores_depend_on_is_measured_again(tmp_path: Path, what: str) -> None:
    study = make(tmp_path)
    measured(tmp_path, tmp_path / "out", methods=["average"])
    before = len(calls(tmp_path))
    if what == "evaluator":
        (tmp_path / "again.py").write_text(EVALUATOR + "\n# other\n")
        (result,) = bench([load_study(study)], tmp_path / "out", evaluator=tmp_path / "again.py", methods=["average"])
        assert len(calls(tmp_path)) == 2 * before
    elif what == "weights":
        make(tmp_path, seed=1)
        measured(tmp_path, tmp_path / "out", methods=["average"])
        assert len(calls(tmp_path)) == 2 * before
    else:
        study.write_text(study.read_text().replace("{data:", "{offset: 1.0, data:"))
        result = measured(tmp_path, tmp_path / "out", methods=["average"])
        assert result.rows[0].score == pytest.approx(97.0, abs=1e-4)


def test_studies_of_one_title_are_repetitions(tmp_path: Path) -> None:
    make(tmp_path / "a", 0)
    make(tmp_path / "b", 1, text=STUDY.replace("{data: DATA}", "{data: DATA, offset: 2.0}"))
    both = bench(
        [load_study(tmp_path / "a"), load_study(tmp_path / "b")],
        tmp_path / "out",
        evaluator=tmp_path / "a" / "score.py",
    )
    assert len(both) == 1
    average = next(row for row in both[0].rows if row.name == "average")
    distance = 4 * (2 / 3) ** 0.5
    shares = [(100 - distance) / 100, (102 - distance) / 102]
    assert average.normalised == pytest.approx(sum(shares) / 2, abs=1e-6)
    assert average.spread == pytest.approx(abs(shares[0] - shares[1]) / 2**0.5, rel=1e-3)


def test_two_titles_are_two_results(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", text=STUDY.replace("Colours", "Others"))
    found = bench(
        [load_study(tmp_path / "a"), load_study(tmp_path / "b")],
        tmp_path / "out",
        evaluator=tmp_path / "a" / "score.py",
        methods=["average"],
    )
    assert [result.title for result in found] == ["Colours", "Others"]


def test_without_methods_all_that_apply_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, text=STUDY[: STUDY.index("methods:")])
    monkeypatch.setattr("weightsmith.study.grids.GRIDS", {"average": (("linear", {}),), "ties": (("ties", {}),)})
    result = measured(tmp_path, tmp_path / "out", methods=["average", "ties", "karcher"])
    assert [row.name for row in result.of("merge")] == ["average", "ties", "karcher"]
    assert "slerp" in result.left_out


def test_a_merge_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    merge = run.run

    def failing(recipe: Any, *args: Any, **named: Any) -> Any:
        if recipe.method[0].name == "ties" or recipe.method[0].parameters.get("lambda") == 0.5:
            raise NumericError("blocks.0.weight: NaN")
        return merge(recipe, *args, **named)

    monkeypatch.setattr(run, "run", failing)
    result = measured(tmp_path, tmp_path / "out")
    assert [row.name for row in result.of("merge")] == ["average", "sum"]
    assert result.failed[0] == "sum, lambda 0.5: blocks.0.weight: NaN"
    assert result.left_out["TIES"] == "no merge of it could be made"


def test_the_command_writes_json_markdown_page_and_picture(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path)
    words = ["bench", str(tmp_path), "--evaluator", str(tmp_path / "score.py")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "Colours: 3 methods, 3 tasks" in shown.out
    assert "  sum (lambda 0.25): " in shown.out
    assert "best merge: " in shown.out
    out = tmp_path / "bench"
    stored = json.loads((out / "results.json").read_text())["results"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stored
    assert [row["name"] for row in stored[0]["rows"]][-3:] == ["average", "sum", "TIES"]
    page = (out / "results.html").read_text()
    assert "<script" not in page
    assert page.index("In words") < page.index('class="bars"') < page.index("<table")
    assert "<h1>Colours: what merging keeps</h1>" in page
    assert 'src="http' not in page
    assert "Published orders" not in page  # the labels of this study are its own
    assert "| **average** |" in (out / "results.md").read_text() or "| **sum** |" in (out / "results.md").read_text()
    assert (out / "results.svg").read_text().startswith("<svg")
    assert stored[0]["rows"][-2]["edges"] == ["lambda"]
    assert "wider grid may find better: sum (lambda)" in shown.out
    assert main(["merge", stored[0]["rows"][-2]["recipe"], str(tmp_path / "kept"), "--quiet"]) == 0


def _tensors(file: Path) -> list[Any]:
    from safetensors.numpy import load_file

    return list(load_file(file).values())


def test_an_expert_below_the_base_on_its_own_task_is_flagged(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path)
    save(tmp_path / "red.safetensors", np.full(24, 99.0))
    result = measured(tmp_path, tmp_path / "out", methods=["average"])
    assert {row.name: row.flags for row in result.rows if row.flags} == {"expert red": ("worse than the base on red",)}
    assert in_words(result)[0] == "expert red is worse than the base on red: its share there says little"
    table = main_table(result)
    assert [row["name"] for row in table.rows][1:3] == ["expert red †", "expert green"]
    assert "† expert red: worse than the base on red" in table.notes
