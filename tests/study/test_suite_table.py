"""A suite's table: figures by hand, uncertainty, cache, resumption, faults of evaluators."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from suite_toy import PROGRAM, RUN, calls, make

from weightsmith.cli.main import main
from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.study.bootstrap import resample
from weightsmith.study.scoring import Scale, wilson
from weightsmith.study.suite import LOWER, PER_UNIT, Rule, Task
from weightsmith.study.suite_bench import bench_suite, write_suite_pages
from weightsmith.study.suite_show import csv_text, document, in_words, markdown_page

FULL = RUN.replace("homes:", "joint: joint.safetensors\nhomes:").replace(
    "methods:", "  grey: {domain: forgetting, role: guard, program: {command: PROGRAM}}\nmethods:"
)
TUNED = FULL.replace(
    "methods:", "  red_loss: {domain: math, role: proxy, direction: lower, program: {command: PROGRAM}}\nmethods:"
).replace("lambda: 1.0", "lambda: [0.25, 0.5, 1.0]")


def test_figures_by_hand(tmp_path: Path) -> None:
    result = bench_suite(make(tmp_path, FULL), tmp_path / "out")
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["base", "expert red", "expert green", "expert blue", "joint", "average", "sum"]
    # A score is 0.5 at the base and 0.9 at the expert; the average goes a third of the way, the sum all of it.
    assert rows["base"].figures.domains == pytest.approx({"math": 0.5, "coding": 0.5, "safety": 0.5})
    assert rows["expert red"].figures.normalised["math"] == 1.0
    assert rows["base"].figures.forgetting == 0.0
    assert rows["base"].figures.retention == 1.0
    assert rows["average"].figures.mean == pytest.approx(0.63)
    assert rows["average"].figures.figure == pytest.approx(0.63 / 0.9)
    assert rows["average"].figures.gain["math"] == pytest.approx(0.13 / 0.4)
    assert rows["average"].figures.forgetting == pytest.approx(-0.1)
    assert rows["average"].figures.retention == pytest.approx(0.7 / 0.8)
    assert rows["sum"].figures.figure == pytest.approx(1.0)
    assert rows["sum"].joint == pytest.approx(0.0)
    best_expert = (0.9 + 0.5 + 0.5) / 3
    assert rows["average"].regret_expert == pytest.approx(best_expert - 0.63)
    assert rows["average"].regret_sum == pytest.approx(0.9 - 0.63)
    assert rows["base"].errors["red"] == pytest.approx((0.25 / 99) ** 0.5)  # of 100 coins
    low, high = rows["sum"].versus["base"][1:3]
    assert low < 0.4 / 0.9 < high
    assert not rows["average"].tied
    assert result.costs["sum"].merge_seconds > 0
    assert result.costs["sum"].evaluate_seconds > 0
    assert "not the whole suite" in in_words(result)[0]


def test_coefficients_are_chosen_on_proxies_and_the_test_is_asked_once(tmp_path: Path) -> None:
    run = make(tmp_path, TUNED)
    result = bench_suite(run, tmp_path / "out", methods=["sum"])
    (row,) = [row for row in result.rows if row.kind == "merge"]
    assert row.chosen == "lambda 1"
    assert list(result.tried["sum"]) == ["lambda 0.25", "lambda 0.5", "lambda 1"]
    # experts and three candidates on the proxy; base, experts, joint and the choice on the tests
    assert calls(tmp_path).count("red_loss") == 3 + 3
    assert calls(tmp_path).count("green") == 1 + 3 + 1 + 1
    cost = result.costs["sum"]
    assert cost.candidates == 3
    assert cost.tune_seconds > 0
    model = 24 * 4  # bytes
    assert cost.read_bytes == 4 * model, "the inputs are read in one pass for all candidates"
    assert cost.write_bytes == 3 * model, "three merges, each counted once"
    assert not (tmp_path / "out" / "merged").exists()


def test_nothing_is_measured_twice_and_a_changed_byte_is_seen(tmp_path: Path) -> None:
    run = make(tmp_path, TUNED)
    first = bench_suite(run, tmp_path / "out")
    before = len(calls(tmp_path))
    assert bench_suite(run, tmp_path / "out") == first
    assert len(calls(tmp_path)) == before
    file = tmp_path / "red.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # size and time stay what they are
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    bench_suite(run, tmp_path / "out")
    again = calls(tmp_path)[before:]
    # the changed expert on all five tasks, every merge with it, and neither the base nor the other experts
    assert again.count("green") == 1 + 2
    assert again.count("red_loss") == 1 + 3


def test_a_changed_task_file_or_setting_is_measured_anew(tmp_path: Path) -> None:
    from weightsmith.study.evaluators.measure import _libraries, version
    from weightsmith.study.evaluators.specs import Choices, LmEval, Program, Retrieval
    from weightsmith.study.evaluators.subject import Setting

    file = tmp_path / "a.jsonl"
    file.write_text("one")
    spec, setting = Choices(file=str(file)), Setting()
    first = version("choices", spec, setting, {})
    assert version("choices", spec, setting, {}) == first
    for other in (replace(setting, template="chat"), replace(setting, dtype="bfloat16"), replace(setting, limit=3)):
        assert version("choices", spec, other, {}) != first
    assert version("choices", Choices(file=str(file), prefix="x"), setting, {}) != first
    file.write_text("two")
    assert version("choices", spec, setting, {}) != first
    python = tmp_path / "env" / "bin" / "python"
    site = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    (site / "lm_eval-0.4.13.dist-info").mkdir(parents=True)
    harness, where = LmEval(task="t"), {"lm_eval": str(python)}
    first = version("lm_eval", harness, setting, where)
    (site / "lm_eval-0.4.13.dist-info").rename(site / "lm_eval-0.5.dist-info")
    _libraries.cache_clear()  # as a new process does
    assert version("lm_eval", harness, setting, where) != first
    program = Program(command=f"python {file} {{model}}")
    first = version("program", program, setting, {})
    file.write_text("three")
    assert version("program", program, setting, {}) != first
    for name in ("queries", "corpus"):  # two files of one name
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(name)
    pair = Retrieval(file=str(tmp_path / "queries" / "a.jsonl"), corpus=str(tmp_path / "corpus" / "a.jsonl"))
    first = version("retrieval", pair, setting, {})
    (tmp_path / "queries" / "a.jsonl").write_text("others")
    assert version("retrieval", pair, setting, {}) != first


def test_a_task_that_changes_while_the_suite_runs_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    score = tmp_path / "score.py"
    score.write_text(PROGRAM + f"if task == 'blue': open('{score}', 'a').write('# later')\n")
    with pytest.raises(RecipeError, match=r"base, task blue: its files changed while the suite ran"):
        bench_suite(run, tmp_path / "out")
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 2, "of red and green only"
    score.write_text(PROGRAM)
    assert bench_suite(run, tmp_path / "out").rows[0].scores["blue"] == 0.5


def test_killed_and_resumed_gives_the_same_json(tmp_path: Path) -> None:
    run = make(tmp_path, TUNED)
    words = [sys.executable, "-m", "weightsmith", "bench", str(run), "--quiet", "--out"]
    subprocess.run([*words, str(tmp_path / "whole")], check=True, timeout=60)
    half = len(calls(tmp_path)) // 2
    (tmp_path / "calls").unlink()
    child = subprocess.Popen([*words, str(tmp_path / "out")], start_new_session=True)
    end = time.monotonic() + 60
    while len(calls(tmp_path)) < half and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    subprocess.run([*words, str(tmp_path / "out")], check=True, timeout=60)
    assert (tmp_path / "out" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert len(calls(tmp_path)) <= 2 * half + 2, "one call of the killed run is lost at most"


def test_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, TUNED)
    assert main(["bench", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "best merge: sum (lambda 1)" in shown
    out = tmp_path / "bench"
    assert {file.name for file in out.iterdir()} >= {
        "results.json",
        "costs.json",
        "results.md",
        "results.csv",
        "results.html",
    }
    held = json.loads((out / "results.json").read_text())
    assert held["result"]["rows"][0]["scores"]["red"] == 0.5
    assert set(json.loads((out / "costs.json").read_text())["rows"]) >= {"sum", "average", "base"}
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 7
    assert "tied" in lines[0]
    page = (out / "results.html").read_text()
    assert page.count('type="radio"') == 1 + 3, "cost against score, and three domains in pairs"
    assert "<script" not in page
    assert main(["bench", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == held["result"]


def test_a_limit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    assert main(["bench", str(run), "--limit", "5"]) == 0
    assert "indicative only: at most 5 examples per task" in capsys.readouterr().out
    page = (tmp_path / "bench" / "results.md").read_text()
    assert "indicative only" in page
    assert "red, green, blue: measured whole, for the limit does not reach them" in page
    assert "not the whole suite: no expert called instruction, multilingual" in page


# --- evaluators that fail ----------------------------------------------------------------------------

FAULTS = [
    ("raise SystemExit('no such data')", "ended with code 1: no such data"),
    ("import time; time.sleep(60)", "stopped after 0.5 s"),
    ("print('hello')", "the last line that it prints should be JSON, is 'hello'"),
    ("print('[1]')", "gave list; expected a number, a score or metrics"),
    ("print('{\"scores\": 1}')", "gave no score and no metrics, but scores"),
    ('print(\'{"metrics": {"acc": 1}}\')', "unknown metric 'score'"),
    ("print('NaN')", "score is nan, not a finite number"),
    ('print(\'{"score": "high"}\')', "score is 'high', not a finite number"),
    ('print(\'{"score": 1, "examples": [NaN, 1]}\')', "the score of an example is not a finite number"),
    ("", "the last line that it prints should be JSON, is ''"),
]


@pytest.mark.parametrize(("code", "said"), FAULTS, ids=[said[:25] for _, said in FAULTS])
def test_an_evaluator_that_fails_ends_the_run_in_a_line(tmp_path: Path, code: str, said: str) -> None:
    run = make(tmp_path, RUN.replace("command: PROGRAM}", "command: PROGRAM, seconds: 0.5}"))
    (tmp_path / "score.py").write_text(code)
    with pytest.raises((RecipeError, NumericError)) as error:
        bench_suite(run, tmp_path / "out")
    assert said in str(error.value)
    (tmp_path / "score.py").write_text(PROGRAM)
    assert bench_suite(make(tmp_path), tmp_path / "out").rows, "nothing wrong was kept"


def test_no_process_outlives_its_evaluator(tmp_path: Path) -> None:
    run = make(tmp_path, RUN.replace("command: PROGRAM}", "command: PROGRAM, seconds: 1.0}"))
    code = f"import os, time\nif os.fork() == 0:\n    time.sleep(3)\n    open('{tmp_path}/late', 'w')\ntime.sleep(60)"
    (tmp_path / "score.py").write_text(code)
    with pytest.raises(RecipeError, match="stopped after 1 s"):
        bench_suite(run, tmp_path / "out")
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


# --- formulae ----------------------------------------------------------------------------------------

A, B = Task("a", "m", "one"), Task("b", "m", "two", direction=LOWER)


def test_lower_is_better_and_amounts() -> None:
    scale = Scale((A, B), Rule("."), {"a": 0.5, "b": 0.5}, {"x": {"a": 1.0, "b": 0.9}, "y": {"a": 0.2, "b": 0.2}},
                  {"one": "x", "two": "y"})  # fmt: skip
    figures = scale.figures({"a": 0.75, "b": 0.4})
    assert figures.normalised == pytest.approx({"one": 0.75, "two": 0.6 / 0.8})
    assert figures.worst in ("one", "two")
    assert scale.worse_than_base() == {}
    bits = Task("c", "m", "three", direction=PER_UNIT)
    amounts = Scale((bits,), Rule("."), {"c": 4.0}, {"x": {"c": 2.0}}, {"three": "x"})
    assert amounts.figures({"c": 2.5}).figure == pytest.approx(2.0 / 2.5)


def test_experts_that_are_worse_than_the_base_or_score_nothing() -> None:
    scale = Scale((A, B), Rule("."), {"a": 0.5, "b": 0.5}, {"x": {"a": 0.4, "b": 0.9}, "y": {"a": 0.2, "b": 1.0}},
                  {"one": "x", "two": "y"})  # fmt: skip
    assert scale.worse_than_base() == {"x": ("one",), "y": ("two",)}
    figures = scale.figures({"a": 0.5, "b": 0.5})
    assert figures.normalised == {"one": 0.5 / 0.4}, "nothing is divided by a score of 0"
    assert figures.gain == {}, "an expert that does not gain has no gain to keep"


def test_no_interval_is_claimed_without_examples_and_no_share_of_nothing(tmp_path: Path) -> None:
    run = make(tmp_path)
    code = PROGRAM.replace('"examples": examples', '"examples": []').replace(
        "score = max(0.0, 0.5", "score = max(0.0, 0.0"
    )
    (tmp_path / "score.py").write_text(code)
    result = bench_suite(run, tmp_path / "out")
    assert not any(row.versus or row.tied for row in result.rows)
    assert "red, green, blue: no scores of single examples" in "; ".join(in_words(result))
    assert "beyond chance" not in "; ".join(in_words(result))
    nothing = code.replace("0.4 * min(reach, 2 - reach)", "0.0")
    (tmp_path / "score.py").write_text(nothing)
    shutil.rmtree(tmp_path / "out")
    result = bench_suite(run, tmp_path / "out")
    assert all(row.figures.figure is None for row in result.rows)
    assert "math, coding, safety: no part of the normalised score" in "; ".join(in_words(result))
    assert document(result)


def test_what_is_not_above_0_divides_nothing_and_turns_no_choice_round(tmp_path: Path) -> None:
    scale = Scale((A,), Rule("."), {"a": -2.0}, {"x": {"a": -1.0}}, {"one": "x"})
    assert scale.figures({"a": -3.0}).normalised == {}
    run = make(tmp_path, TUNED.replace("role: proxy, direction: lower,", "role: proxy,"))
    (tmp_path / "score.py").write_text(
        PROGRAM + 'if task == "red_loss": print(json.dumps(-1 - abs(values[0] - base[0] - 2)))\n'
    )
    result = bench_suite(run, tmp_path / "out", methods=["sum"])
    assert result.rows[-1].chosen == "lambda 0.5"  # -1; divided by the best expert's -3, -2 would be more


def test_scores_that_a_direction_does_not_take_are_refused(tmp_path: Path) -> None:
    for direction, code, said in (("lower", "37", "a rate from 0 to 1, is 37"), ("per unit", "0", "above 0, is 0")):
        run = make(tmp_path, RUN.replace("domain: math,", f"domain: math, direction: {direction},"))
        (tmp_path / "score.py").write_text(f"print({code})")
        with pytest.raises(RecipeError, match=said):
            bench_suite(run, tmp_path / "out")


def test_examples_that_do_not_have_the_score_as_their_mean_give_no_interval(tmp_path: Path) -> None:
    run = make(tmp_path)
    (tmp_path / "score.py").write_text(PROGRAM.replace('"score": sum(examples) / n', '"score": 0.9'))
    assert not any(row.versus for row in bench_suite(run, tmp_path / "out").rows)


def test_flags_reach_the_pages(tmp_path: Path) -> None:
    run = make(tmp_path, RUN.replace("math: red, coding: green", "math: green, coding: red"))
    (tmp_path / "score.py").write_text(PROGRAM.replace("score = max(", "score = -0.01 * (reach == 0) + max("))
    data = (tmp_path / "score.py").read_text().replace("-0.01 * (reach == 0)", "0.05 * (sum(values) == sum(base))")
    (tmp_path / "score.py").write_text(data)
    result = bench_suite(run, tmp_path / "out")
    flagged = {row.name: row.flags for row in result.rows if row.flags}
    assert flagged == {
        "expert red": ("worse than the base on coding",),
        "expert green": ("worse than the base on math",),
    }
    for text in (markdown_page(result), document(result)):
        assert "worse than the base on coding" in text
    assert "†" not in csv_text(result)
    write_suite_pages(result, tmp_path / "pages")


def test_what_is_measured_besides_the_scores_is_kept(tmp_path: Path) -> None:
    run = make(tmp_path)
    (tmp_path / "score.py").write_text(
        PROGRAM.replace('json.dumps({"score": sum(examples) / n, "examples": examples})',
                        'json.dumps({"metrics": {"score": score, "do_nothing": 0.25, "validity": 0.5}})'))  # fmt: skip
    result = bench_suite(run, tmp_path / "out")
    assert all(row.metrics["red"] == {"do_nothing": 0.25, "validity": 0.5} for row in result.rows)
    assert "red: giving back what is to be edited scores 0.250" in in_words(result)
    for text in (markdown_page(result), document(result), csv_text(result)):
        assert "red validity" in text


def test_an_embedding_models_own_parts_are_seen(tmp_path: Path) -> None:
    from weightsmith.recipe.schema import ModelRef
    from weightsmith.study.suite_lab import beside

    seen = [beside(ModelRef(model=str(tmp_path)))]
    for name in ("config_sentence_transformers.json", "2_Dense/model.safetensors", "tokenizer.json"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("1")
        seen.append(beside(ModelRef(model=str(tmp_path))))
        file.write_text("2")
        seen.append(beside(ModelRef(model=str(tmp_path))))
    assert len({json.dumps(one) for one in seen}) == len(seen)


def test_the_bootstrap_pairs_examples_and_repeats_itself() -> None:
    draw = np.random.default_rng(1)
    one = draw.integers(0, 2, 200).astype(float)
    better = np.maximum(one, (np.arange(200) % 10 == 0).astype(float))
    noise = draw.permutation(one)
    examples = {name: {"a": values.tolist()} for name, values in (("x", one), ("y", better), ("z", noise))}
    scores = {name: {"a": float(np.mean(held["a"]))} for name, held in examples.items()}
    found = resample((A,), Rule("."), {"one": 1.0}, scores, examples)
    assert found.figures.shape == (10_000, 3)
    assert not found.versus("y", "x").tied, "better wherever they differ"
    assert found.versus("x", "z").tied
    assert found.versus("x", "x").low == found.versus("x", "x").high == 0
    # the spread of a difference of pairs, in closed form
    differences = better - one
    wanted = differences.std() / 200**0.5
    assert (found.figures[:, 1] - found.figures[:, 0]).std() == pytest.approx(wanted, rel=0.03)
    again = resample((A,), Rule("."), {"one": 1.0}, scores, examples)
    assert np.array_equal(again.figures, found.figures)


def test_a_task_without_examples_adds_no_uncertainty() -> None:
    found = resample((A,), Rule("."), {"one": 1.0}, {"x": {"a": 0.5}, "y": {"a": 0.4}}, {"x": {}, "y": {}}, draws=10)
    assert found.versus("x", "y").low == pytest.approx(0.1)


def test_wilson() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
