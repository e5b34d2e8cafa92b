"""What is wrong with a study, its evaluator or its options: one line, exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_family import EVALUATOR, STUDY, calls, make

from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError
from weightsmith.recipe.load import read_text
from weightsmith.study.schema import EXAMPLE, Study, load_study
from weightsmith.study.suite_file import EXAMPLE as SUITE_EXAMPLE
from weightsmith.study.suite_file import SuiteRun

Captured = pytest.CaptureFixture[str]

HEAD = STUDY[: STUDY.index("methods:")]


def refused(capsys: Captured, *words: object) -> str:
    assert main(["bench", *map(str, words)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Colours", "titel: Colours", "study.yaml:2:1: unknown key 'titel' in the study; did you mean 'title'?"),
        ("title: Colours", "title: [a]", 'title should be a text, is ["a"]'),
        ("title: Colours", "evaluator: score.py", "named on the command line: --evaluator FILE"),
        ("base: base.safetensors", "", "a study needs a base"),
        ("base: base.safetensors", "base: bas.safetensors", "bas.safetensors"),
        ("blue: blue.safetensors", "blue: red.safetensors", "is the same model as models.red"),
        ("guards: [grey]", "guards: [red]", "'red' is a task and a guard"),
        ("guards: [grey]", "guards: 3", "guards should be a word or a list of words, is 3"),
        ("joint: joint.safetensors", "joint: gone", "joint: no file or folder 'gone' beside the study"),
        ("score: closeness", "higher_is_better: up", 'should be true or false, is "up"'),
        ("{function: {data: DATA}}", "{fuction: {}}", "evaluate takes one of function, bits_per_byte, accuracy"),
        ("{function: {data: DATA}}", "{function: 3}", "evaluate.function should be a mapping, is 3"),
        ("{function: {data: DATA}}", "bits_per_byte", "evaluate takes one of"),
        ("{function: {data: DATA}}", "mine.py", "name the file of yours by --evaluator mine.py"),
        ("linear", "linaer", "average: unknown method 'linaer'; did you mean 'linear'?"),
        ("average: linear", "average: [[linear]]", "average: a stage is a name, or a name with its parameters"),
        ("[0.25, 0.5, 1.0]", "[]", "sum: task_arithmetic.lambda is an empty list"),
        ("lambda: [0.25", "lamda: [0.25", "did you mean 'lambda'?"),
        ("[0.5, 1.0]}}", "[0.5, 7]}}", "7"),
    ],
)
def test_a_study_that_cannot_be_meant(tmp_path: Path, capsys: Captured, old: str, new: str, message: str) -> None:
    assert STUDY.count(old) == 1
    make(tmp_path, text=STUDY.replace(old, new))
    said = refused(capsys, tmp_path, "--evaluator", tmp_path / "score.py")
    assert message in said
    assert len(said.splitlines()) == 1
    assert calls(tmp_path) == []


def test_data_of_a_built_in_evaluator(tmp_path: Path, capsys: Captured) -> None:
    files = "{validation: a.txt, test: a.txt}"
    text = HEAD.replace("{function: {data: DATA}}", f"{{bits_per_byte: {{red: {files}, green: {files}}}}}")
    make(tmp_path, text=text)
    said = refused(capsys, tmp_path)
    assert "evaluate.bits_per_byte.red.validation: no file a.txt" in said
    assert "evaluate.bits_per_byte needs blue: {validation: FILE, test: FILE}" in said
    (tmp_path / "a.txt").write_text("text")
    assert "evaluate.bits_per_byte.red: validation and test are the same file" in refused(capsys, tmp_path)


def test_no_code_runs_that_was_not_named(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path)
    assert "name the python file that defines scores(model, split) with --evaluator FILE" in refused(capsys, tmp_path)
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(model, split): ...", "it defines no scores(model, split); did you mean 'score'?"),
        ("1 / 0", ":1: ZeroDivisionError"),
        ("def scores(model, split, data):\n    return 3", "gives int, not a mapping"),
        ("def scores(model, split, data):\n    return {'red': 1, 'green': 2, 'blu': 3}", "did you mean 'blu'?"),
        (
            "def scores(model, split, data):\n    return dict.fromkeys(['red', 'green', 'blue', 'grey'], float('nan'))",
            "nan",
        ),
        (
            "def scores(model, split, data):\n    return dict.fromkeys(['red', 'green', 'blue', 'grey'], '1')",
            "'1', not a",
        ),
        ("def scores(model, split, data):\n    raise ValueError('no data')", "ValueError: no data"),
        ("def scores(model, split):\n    return {}", "unexpected keyword argument 'data'"),
    ],
)
def test_an_evaluator_that_does_not_score(tmp_path: Path, capsys: Captured, code: str, message: str) -> None:
    make(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    assert main(["bench", str(tmp_path), "--evaluator", str(tmp_path / "mine.py")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "mine.py" in said


def test_options(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path)
    score = tmp_path / "score.py"
    assert "no study" in refused(capsys)
    assert f"no such study; write one, or name a folder that has study.yaml: {EXAMPLE}" in refused(
        capsys, tmp_path / "gone.yaml"
    )
    assert "no such file" in refused(capsys, tmp_path, "--evaluator", tmp_path / "gone.py")
    assert "no method 'tise' in this study; known: TIES, average, sum" in refused(
        capsys, tmp_path, "--evaluator", score, "--methods", "tise,sum"
    )
    assert "is a file" in refused(capsys, tmp_path, "--evaluator", score, "--out", score)
    assert "--threads 0" in refused(capsys, tmp_path, "--evaluator", score, "--threads", "0")
    assert "named twice" in refused(capsys, tmp_path, tmp_path / "study.yaml", "--evaluator", score)


def test_repetitions_must_be_alike(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", text=STUDY.replace("guards: [grey]", ""))
    said = refused(capsys, tmp_path / "a", tmp_path / "b", "--evaluator", tmp_path / "a" / "score.py")
    assert "guards differ from those of" in said


def test_a_named_method_that_cannot_run_is_an_error(tmp_path: Path, capsys: Captured) -> None:
    make(tmp_path, text=STUDY.replace("average: linear", "arc: slerp"))
    said = refused(capsys, tmp_path, "--evaluator", tmp_path / "score.py")
    assert said.startswith("error: arc: ")
    make(tmp_path, text=HEAD)
    said = refused(capsys, tmp_path, "--evaluator", tmp_path / "score.py", "--methods", "slerp")
    assert "it takes a base and one model, or two models" in said


def test_a_folder_and_its_file_are_the_same_study(tmp_path: Path) -> None:
    file = make(tmp_path)
    assert load_study(tmp_path) == load_study(file)
    assert load_study(file).methods is not None
    assert EVALUATOR


def test_names_of_pipelines_are_methods(tmp_path: Path) -> None:
    file = make(tmp_path, text=STUDY.replace("average: linear", "DARE-TIES: {dare_ties: {density: [0.3, 0.5]}}"))
    methods = load_study(file).methods
    assert methods is not None
    assert [[(s.name, s.parameters) for s in one.stages] for one in methods["DARE-TIES"]] == [
        [("dare", {"density": density}), ("ties", {"density": 1, "scope": "tensor"})] for density in (0.3, 0.5)
    ]


def test_language_models_need_no_code(tmp_path: Path, capsys: Captured) -> None:
    """bits_per_byte: a byte-level Llama whose logits are all equal needs 8 bits for every byte."""
    import json

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, bos_token_id=None,
                         num_attention_heads=1, num_key_value_heads=1, eos_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for name in ("base", "one", "two"):
        if name != "base":
            with torch.no_grad():
                model.model.embed_tokens.weight += 0.1 * torch.randn(256, 8)
        model.save_pretrained(tmp_path / name)
    for name in ("validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"some text for {name}")
    files = {"validation": "validation.txt", "test": "test.txt"}
    study = {"base": "base", "models": {"one": "one", "two": "two"}, "methods": {"average": "linear"},
             "evaluate": {"bits_per_byte": {"one": files, "two": files}}}  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    assert main(["bench", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["score_name"] == "bits per byte"
    assert found["higher_is_better"] is False
    assert [row["score"] for row in found["rows"]] == pytest.approx([8.0] * 4)
    assert found["without_gain"] == ["one", "two"]
    assert np.isfinite([row["normalised"] for row in found["rows"]]).all()


def test_an_evaluator_may_import_its_neighbours(tmp_path: Path) -> None:
    """And what they say counts for the scores that are kept."""
    from toy_family import EVALUATOR, make

    from weightsmith.study.bench import bench
    from weightsmith.study.evaluate import scorer
    from weightsmith.study.schema import load_study

    study = make(tmp_path)
    helper = tmp_path / "beside_the_evaluator.py"
    helper.write_text("OFFSET = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "from beside_the_evaluator import OFFSET\n" + EVALUATOR.replace("100 + offset", "100 + OFFSET")
    )
    (result,) = bench([load_study(study)], tmp_path / "out", evaluator=tmp_path / "mine.py", methods=["average"])
    assert result.rows[0].score == pytest.approx(97.0, abs=1e-4)
    before = scorer(load_study(study), tmp_path / "mine.py").identity
    helper.write_text("OFFSET = 2.0\n")
    assert scorer(load_study(study), tmp_path / "mine.py").identity != before


@pytest.mark.parametrize(("kind", "example"), [(Study, EXAMPLE), (SuiteRun, SUITE_EXAMPLE)])
def test_the_example_of_a_file_lacks_nothing_but_its_files(kind: Any, example: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_text(kind, example, "x.yaml", folder=tmp_path)
    assert all("no file" in problem.text or "no such file" in problem.text for problem in caught.value.problems)
