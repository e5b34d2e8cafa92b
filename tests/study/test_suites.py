"""Suites as values, and the grammar of a run's file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from suite_toy import RUN, make

from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.study.grids import candidates
from weightsmith.study.suite import LOWER, PER_UNIT, Task
from weightsmith.study.suite_bench import bench_suite
from weightsmith.study.suite_data import overlaps
from weightsmith.study.suite_file import Bound, bound_tasks, load_run
from weightsmith.study.suite_methods import thinned
from weightsmith.study.suites import suite, suites

Captured = pytest.CaptureFixture[str]


def test_every_file_is_a_suite() -> None:
    assert set(suites()) == {"mergebench", "three_h", "scale", "svg", "embedding", "in_the_wild"}
    for name, one in suites().items():
        assert one.name == name
        assert one.rule.words.endswith(".")
        names = [task.name for task in one.tasks]
        assert len(set(names)) == len(names)
        for method in (one.methods or {}).values():
            for made in (method.paper, method.grid):
                assert made is None or candidates(made(("a", "b", "c")))


def test_the_suites_have_what_their_papers_count() -> None:
    bench = suite("mergebench")
    assert len(bench.methods or {}) == 8
    assert len({task.domain for task in bench.tasks if task.role == "test"}) == 5
    assert len([task for task in bench.tasks if task.role == "guard"]) == 6
    assert not any(task.domain == "instruction" for task in bench.tasks if task.role == "proxy"), "IFEval would leak"
    harm = suite("three_h")
    assert (len(harm.methods or {}), len(harm.tasks)) == (12, 10)
    assert (len(harm.experts), len(harm.checkpoints)) == (5, 3)
    assert harm.rule.combine({"helpful": 0.5, "honest": 1.0, "harmless": 1.5}) == 1.0
    assert suite("scale").counts == (2, 4, 6, 8)
    assert suite("in_the_wild").counts == tuple(range(2, 13))


def test_every_paper_setting_plans(tmp_path: Path) -> None:
    """All methods but those that need statistics merge four toy models."""
    for name in ("mergebench", "three_h", "embedding", "svg", "scale", "in_the_wild"):
        text = RUN[: RUN.index("methods:")].replace("mergebench", name)
        for old, new in zip(("math", "coding", "safety"), suite(name).domains, strict=False):
            text = text.replace(f"domain: {old}", f"domain: {new}")
        run = make(tmp_path / name, text)
        loaded, chosen = load_run(run)
        from weightsmith.core.settings import DEFAULT
        from weightsmith.study.cache import Ledger
        from weightsmith.study.suite_lab import Lab
        from weightsmith.study.suite_methods import methods_of

        ledger = Ledger(tmp_path / "none.jsonl")
        lab = Lab.over(loaded.bases[""], "x", ledger, tmp_path, DEFAULT, setting=loaded.setting("cpu"), environments={})
        made, left_out = methods_of(loaded, chosen, [lab], (), tune=True)
        assert set(left_out) <= {"Fisher", "RegMean"}
        assert len(made) + len(left_out) == len(chosen.methods or {})
        for label, found in made.items():
            assert len(found) <= loaded.budget
            for one in found:
                assert not lab.problems(one), (name, label, one.label)


def test_directions() -> None:
    assert Task("a", "m", "d", direction=LOWER).up(0.25) == 0.75
    assert Task("a", "m", "d", direction=PER_UNIT).up(4.0) == 0.25
    assert Task("a", "m", "d").up(0.25) == 0.25


def test_thinning_keeps_the_papers_settings_and_the_ends() -> None:
    made = candidates((("task_arithmetic", {"lambda": [float(n) for n in range(1, 91)]}),))
    few = thinned(made, 10)
    assert len(few) == len({one.label for one in few}) == 10
    assert few[0] == made[0]
    assert few[-1] == made[-1]
    grid = suite("mergebench").methods["TIES"].grid(())  # type: ignore[index, misc]
    spread = thinned(candidates(grid), 10)
    pairs = [(one.stages[0].parameters["density"], one.stages[0].parameters["lambda"]) for one in spread]
    for density, factor in ((0.1, 0.1), (0.1, 1.0), (0.9, 0.1), (0.9, 1.0)):
        assert (density, factor) in pairs, "the corners of a grid, not its diagonal"
    assert max(sum(d == density for d, _ in pairs) for density, _ in pairs) <= 3
    assert thinned(made, 100) == made
    assert thinned(made, 1) == made[:1]


def test_listing(capsys: Captured) -> None:
    assert main(["bench", "--list"]) == 0
    assert "mergebench" in capsys.readouterr().out
    assert main(["bench", "--suite", "mergebench"]) == 0
    shown = capsys.readouterr().out
    assert "gsm8k_cot" in shown
    assert "Each is divided by" in shown
    assert main(["bench", "--suite", "three_h"]) == 0
    assert "Checkpoints beside the merges: heuristic, armorm, hummer" in capsys.readouterr().out
    assert main(["bench", "--list", "--json"]) == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} == set(suites())
    assert main(["bench", "--suite", "mergebnch"]) == 2
    assert "did you mean 'mergebench'?" in capsys.readouterr().err


_RED = "program: {command: PROGRAM}}\n  green"
CASES = [
    ("suite: mergebench", "suite: mergbench", "unknown suite 'mergbench'; did you mean 'mergebench'?"),
    ("domain: math, ", "", "is none of the suite's tasks; give it a domain"),
    ("domain: math", "domain: maths", "unknown domain 'maths'; did you mean 'math'?"),
    ("domain: math, program", "domain: math, progrm", "needs one evaluator of"),
    ("domain: math, ", "domain: math, role: prox, ", "did you mean 'proxy'?"),
    ("domain: math, ", "domian: math, ", "unknown key 'domian'"),
    ("base: base.safetensors", "", "a suite needs a base"),
    ("homes: {math: red", "homes: {math: rot", "no expert 'rot'"),
    ("homes: {math: red, ", "homes: {", "no expert is called 'math'"),
    ("homes: {math: red", "homes: {maths: red, math: red", "homes.maths: no task has this domain"),
    ("suite: mergebench", "suite: mergebench\ncheckpoints: {expert red: blue.safetensors}", "name of another row"),
    ("average: linear", "base: linear", "methods.base: the name of another row"),
    ("suite: mergebench", "suite: mergebench\nsubsets: 2", "subsets: mergebench merges all experts; leave it out"),
    ("suite: mergebench", "suite: in_the_wild", "homes: in_the_wild merges subsets"),
    (_RED, "generate: {file: base.json, form: hi}}\n  green", "should have {question} in it, is 'hi'"),
    (_RED, "generate: {file: base.json, stop: [a, '']}}\n  green", "has an empty text, which cuts every answer"),
    ("suite: mergebench", "suite: mergebench\ntemplate: hello", "{prompt}"),
    ("suite: mergebench", "suite: mergebench\ncounts: [0]", "whole numbers from 1"),
    ("suite: mergebench", "suite: mergebench\nbudget: 0", "greater than or equal to 1"),
    ("suite: mergebench", "suite: mergebench\nenvironments: {lm_evl: base.safetensors}", "environments.lm_evl"),
    ("lambda: 1.0", "lambda: [0.5, 1.0]", "no task of role: proxy to choose on"),
    (_RED, "choices: base.json, metric: ac}\n  green", "unknown metric 'ac'; did you mean 'acc'"),
    (_RED, "choices: none.jsonl}\n  green", "no file none.jsonl"),
    (_RED, "lm_eval: gsm8k}\n  green", "environments: {lm_eval: ENV/bin/python}"),
    (_RED, "code: base.json}\n  green", "allow it with --allow-code-execution"),
    (_RED, "code: {file: base.json, k: 20}}\n  green", "pass@20 needs at least 20 samples"),
    (_RED, "svg: {operations: color}}\n  green", "unknown operation 'color'; did you mean 'colour'"),
    (_RED, "mteb: {task: a, type: STS}}\n  green", "has both: type and file"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), CASES, ids=[case[2][:30] for case in CASES])
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, old: str, new: str, said: str, capsys: Captured) -> None:
    assert old in RUN
    run = make(tmp_path, RUN.replace(old, new, 1))
    assert main(["bench", str(run), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("results*"))


def test_a_proxy_is_no_test(tmp_path: Path) -> None:
    data = '{"question": "q", "choices": ["a", "b"], "answer": 0}\n'
    text = RUN.replace(
        "  green: {",
        "  a: {domain: math, choices: a.jsonl}\n  b: {domain: math, role: proxy, choices: b.jsonl}\n  green: {",
        1,
    )
    run = make(tmp_path, text)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(data)
    with pytest.raises(RecipeError, match=r"tasks\.b: has the data of a, which is tested"):
        bound_tasks(*load_run(run))
    (tmp_path / "b.jsonl").write_text(data.replace("q", "another"))
    assert len(bound_tasks(*load_run(run))) == 5


HARNESS = "lm_eval: score.py, mteb: score.py"


def _items(*names: str) -> str:
    return "".join(f'{{"answer": 0, "choices": ["a", "b"], "question": "{name}"}}\n' for name in names)


def test_a_test_in_other_clothes_is_no_proxy(tmp_path: Path) -> None:
    """Packed, in another order, written by another hand, or half of it: the examples are what counts."""
    (tmp_path / "a.jsonl").write_text(_items("1", "2", "3", "4"))
    told = "domain: math, choices: a.jsonl"

    def read(test: str, proxy: str) -> dict[str, Bound]:
        text = RUN.replace("  red: {", f"  a: {{{test}}}\n  b: {{domain: math, role: proxy, {proxy}}}\n  red: {{", 1)
        return bound_tasks(*load_run(make(tmp_path, text.replace("homes:", f"environments: {{{HARNESS}}}\nhomes:"))))

    same = json.dumps({"question": "1", "choices": ["a", "b"], "answer": 0})
    for name, data in (("b.jsonl.gz", gzip.compress(_items("4", "2", "3", "1").encode())), ("b.jsonl", same.encode()),
                       ("b.jsonl", _items("1", "2", "x", "y").encode())):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RecipeError, match=r"tasks\.b: has the data of a"):
            read(told, f"choices: {name}")
    (tmp_path / "b.jsonl").write_text(_items("1", "x", "y"))
    assert list(overlaps(read(told, "choices: b.jsonl"))) == ["1 of the 3 examples of the proxy b are tested in a, too"]
    for test, proxy in (
        ("lm_eval: {task: t, shots: 5}", "lm_eval: {task: t}"),
        ("mteb: t", "mteb: {task: t, seconds: 1}"),
        ("svg: {task: edit, count: 9}", "svg: {task: edit, count: 99, operations: crop}"),
    ):
        with pytest.raises(RecipeError, match=r"tasks\.b: has the data of a"):
            read(f"domain: math, {test}", proxy)
    assert not list(overlaps(read("domain: math, svg: edit", "svg: {task: edit, seed: 1}")))


def test_an_unknown_method_or_an_impossible_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no method 'avrage' in this run; did you mean 'average'"):
        bench_suite(make(tmp_path), tmp_path / "out", methods=["avrage"])
    run = make(tmp_path, RUN.replace("average: linear", "average: regmean"))
    with pytest.raises(PlanError, match="average: regmean needs the statistic"):
        bench_suite(run, tmp_path / "out")


def test_options_of_suites_and_studies_do_not_mix(tmp_path: Path, capsys: Captured) -> None:
    run = make(tmp_path)
    for words, said in (
        ([str(run), str(run)], "unknown key 'suite'"),
        ([str(run), "--suite", "svg", str(run)], "a suite takes one file, got 2"),
        ([str(run), "--evaluator", "x.py"], "--evaluator is for studies"),
        ([str(run), "--limit", "0"], "--limit must be at least 1 (got 0)"),
        ([str(tmp_path / "none.yaml"), "--limit", "3"], "--limit and --allow-code-execution are for suites"),
        ([str(tmp_path / "none.yaml"), "--suite", "svg"], "no such file"),
        ([], "no study; name at least one file"),
    ):
        assert main(["bench", *words]) == 2
        assert said in capsys.readouterr().err
