"""lm_eval and mteb themselves, each in an environment and a process of its own, offline, on local tasks and models.

Makes the environments in .bench/harness once (minutes); WEIGHTSMITH_HARNESS names a python that has both instead.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from torture.environments import PACKAGES, ROOT, python_of

sys.path.insert(0, str(Path(__file__).parent.parent / "study"))
from harness_toy import CHOICES, language_model, own_task

from weightsmith.cli.main import main
from weightsmith.study.evaluators.code_tasks import passes
from weightsmith.study.evaluators.language import language
from weightsmith.study.evaluators.processes import lm_eval, mteb
from weightsmith.study.evaluators.specs import Choices, LmEval, Mteb, Sts
from weightsmith.study.evaluators.subject import Setting, Subject
from weightsmith.study.evaluators.text_tasks import choices

HUMANEVAL = next((file for place in (ROOT, ROOT.parent)
                  if (file := place / "shared" / "data" / "humaneval.jsonl.gz").exists()), None)  # fmt: skip
PAIRS = [("a cat", "a cat", 5.0), ("a cat", "the sky", 1.0), ("red", "reds", 4.0), ("one", "three", 0.5)]


@pytest.fixture(scope="module", params=PACKAGES)
def python(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(harness, its python)."""
    return request.param, python_of(request.param)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    for seed, name in enumerate(("base", "one", "two")):
        language_model(folder / name, seed)
    own_task(folder / "tasks")
    pairs = [json.dumps({"sentence1": a, "sentence2": b, "score": s}) for a, b, s in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    return folder


def test_the_harness_gives_what_the_built_in_evaluator_gives(python: tuple[str, str], place: Path) -> None:
    kind, path = python
    subject = Subject("m", place / "base", Setting(batch=4, device="cpu"))
    if kind == "lm_eval":
        found = lm_eval(subject, LmEval(task="own_sums", include=str(place / "tasks")), path)
        own = choices(subject, Choices(file=str(place / "tasks" / "sums.jsonl"), joint=""))
        assert list(found.examples["acc"]) == list(own.examples["acc"])
        assert list(found.examples["acc_norm"]) == list(own.examples["acc_norm"])
        few = lm_eval(
            Subject("m", place / "base", Setting(batch=4, device="cpu", limit=5)),
            LmEval(task="own_sums", include=str(place / "tasks")),
            path,
        )
        assert list(few.examples["acc"]) == list(own.examples["acc"])[:5]
        assert len(CHOICES) == len(own.examples["acc"])
    else:
        from weightsmith.study.evaluators.embeddings import sts

        data = str(place / "pairs.jsonl")
        found = mteb(subject, Mteb(task="own_pairs", type="STS", file=data), path)
        own = sts(subject, Sts(file=data))
        assert found.metrics["cosine_spearman"] == pytest.approx(own.metrics["spearman"], abs=1e-6)
        assert found.metrics["cosine_pearson"] == pytest.approx(own.metrics["pearson"], abs=1e-4)
        other = mteb(
            Subject("o", place / "one", Setting(device="cpu")), Mteb(task="own_pairs", type="STS", file=data), path
        )
        assert other.metrics["cosine_pearson"] != found.metrics["cosine_pearson"], (
            "no result of another model is reused"
        )


def test_a_suite_through_the_harness(python: tuple[str, str], place: Path) -> None:
    kind, path = python
    if kind == "lm_eval":
        task = f"own: {{domain: math, lm_eval: {{task: own_sums, include: {place}/tasks}}}}"
    else:
        told = f"{{task: own_pairs, type: STS, file: {place}/pairs.jsonl}}"
        task = f"own: {{domain: sts, metric: cosine_spearman, mteb: {told}}}"
    suite = "mergebench" if kind == "lm_eval" else "embedding"
    run = place / f"{kind}.yaml"
    homes = "homes: {math: one}\n" if kind == "lm_eval" else ""
    run.write_text(
        f"suite: {suite}\nbase: base\nmodels: {{one: one, two: two}}\n{homes}"
        f"environments: {{{kind}: {path}}}\nmethods: {{average: linear}}\ntasks:\n  {task}\n"
    )
    assert main(["bench", str(run), "--out", str(place / kind), "--quiet"]) == 0
    rows = json.loads((place / kind / "results.json").read_text())["result"]["rows"]
    assert [row["name"] for row in rows] == ["base", "expert one", "expert two", "average"]
    assert all(-1 <= row["scores"]["own"] <= 1 for row in rows)


@pytest.mark.skipif(HUMANEVAL is None, reason="HumanEval lies beside the repository")
def test_every_solution_of_humaneval_passes_and_none_without_a_body() -> None:
    assert HUMANEVAL is not None
    lines = gzip.decompress(HUMANEVAL.read_bytes()).decode().splitlines()
    problems = [json.loads(line) for line in lines]
    for one in problems:
        check = f"\n{one['test']}\ncheck({one['entry_point']})\n"
        assert passes(one["prompt"] + one["canonical_solution"] + check, 10.0, 2048), one["task_id"]
        assert not passes(one["prompt"] + "    return None\n" + check, 10.0, 2048), one["task_id"]


def test_language_models_load(place: Path) -> None:
    model = language(Subject("m", place / "base", Setting(device="cpu")))
    assert len(model.coder.encode("abc")) == 3
    assert len(model.written(["abc"], 4)[0]) == 1
