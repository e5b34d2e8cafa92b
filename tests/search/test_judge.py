"""The user's file or program that scores any model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weightsmith.core.errors import RecipeError, WeightsmithError
from weightsmith.search.judge import absolute, judge


def test_a_file_and_a_program_score_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score it.py").write_text(
        "def scores(model, split):\n    print('at work')\n"
        "    return {'letters': len(model.name), 'test': float(split == 'test')}\n"
    )
    (tmp_path / "count.py").write_text("import sys\nprint('at work')\nprint(len(sys.argv[1]) / 2)\n")
    model = Path("some/model")
    monkeypatch.chdir(tmp_path)
    named = absolute("score it.py")
    assert named == str(tmp_path / "score it.py")
    program = absolute(f"{sys.executable} count.py {{model}}")
    assert str(tmp_path / "count.py") in program
    monkeypatch.chdir("/")
    assert judge(named)(model) == {"letters": 5.0, "test": 1.0}
    assert capsys.readouterr() == ("", "at work\n"), "what it prints is no part of a report in JSON"
    assert judge(program)(model) == {"score": 5.0}
    assert judge(program.replace(" {model}", ""))(model) == {"score": 5.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [("def score(model, split): ...", r"defines no scores\(model, split\); did you mean 'score'"),
     ("def scores(model, split): return {}", "gives no score"),
     ("def scores(model, split): return {'a': 'b'}", "a is 'b', not a finite number"),
     ("def scores(model, split):\n    return 1 / 0", "score.py:2: scores.*ZeroDivisionError")],
)  # fmt: skip
def test_files_that_give_no_scores(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "score.py").write_text(text)
    with pytest.raises(WeightsmithError, match=message):
        judge(str(tmp_path / "score.py"))(Path("model"))


@pytest.mark.parametrize(
    ("given", "message"), [("none.py", "none.py: no such file"), ("no-such-program", "no program"), ("'", "quotation")]
)
def test_what_is_not_there_is_said_at_start(given: str, message: str) -> None:
    for function in (absolute, judge):
        with pytest.raises(RecipeError, match=message):
            function(given)


def test_programs_that_give_no_scores() -> None:
    for program, message in ((f"{sys.executable} -c pass", "prints no JSON"), ("false", "ended with code 1")):
        with pytest.raises(WeightsmithError, match=message):
            judge(program)(Path("model"))
