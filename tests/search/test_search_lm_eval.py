"""A search scored by lm_eval, as it answered (recorded from 0.4.13); `make torture` runs the library itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from search.pantry import stocked, tree
from weightsmith.core.errors import RecipeError
from weightsmith.search.api import search
from weightsmith.search.harness import OFFLINE

RECORDED = Path(__file__).parent.parent / "study" / "recorded" / "lm_eval.json"

# The keywords of lm_eval 0.4.13's simple_evaluate; the answer is the same for every task and model.
LM_EVAL = f"""
import json, os
def simple_evaluate(
    model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, max_batch_size=None, device=None,
    limit=None, bootstrap_iters=100000, log_samples=True, task_manager=None, verbosity=None, random_seed=0,
    numpy_random_seed=1234, torch_random_seed=1234, fewshot_random_seed=1234,
):
    assert all(os.environ[name] == value for name, value in {OFFLINE!r}.items())
    assert model == "hf" and model_args.endswith(",dtype=float32") and batch_size == 8 and bootstrap_iters == 0
    folder = model_args.removeprefix("pretrained=").removesuffix(",dtype=float32")
    assert os.path.exists(os.path.join(folder, "model.safetensors"))
    assert task_manager.told["include_defaults"] is False and device == "cpu"
    BREAK
    out = json.load(open({str(RECORDED)!r}))["out"]
    few = {{"own_sums": None, "own_more": 4}}[tasks[0]]
    out = {{kind: {{tasks[0]: of["own_sums"]}} for kind, of in out.items()}}
    samples = out["samples"][tasks[0]][:few]
    mean = sum(s["acc"] for s in samples) / len(samples)
    results = {{tasks[0]: out["results"][tasks[0]] | {{"acc,none": mean}}}}
    return {{"results": results, "samples": {{tasks[0]: samples}}}}
"""


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """A search whose lm_eval is the recording; `site` beside it holds the stand-in."""
    site = tmp_path / "site"
    (site / "lm_eval").mkdir(parents=True)
    (site / "lm_eval" / "__init__.py").write_text(LM_EVAL.replace("BREAK", "pass"))
    keeps = "class TaskManager:\n    def __init__(self, **told):\n        self.told = told\n"
    (site / "lm_eval" / "tasks.py").write_text(keeps)
    (site / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "pantry").mkdir()
    spec = {"tasks": {"sums": {"search": "own_sums", "report": "own_more"}}, "include": str(tmp_path / "tasks"),
            "python": str(python), "metric": "acc"}  # fmt: skip
    more = {"score": {"lm_eval": spec}, "goals": {"sums": "max"}, "sampler": "random", "evaluations": 2, "rescore": 0}
    return tree(stocked(tmp_path / "pantry"), **more)


def test_lm_eval_is_called_and_read_as_recorded(asked: dict[str, Any], tmp_path: Path) -> None:
    made = search(asked, tmp_path / "out")
    assert [trial.scores for trial in made.search.trials] == [{"sums": 1 / 3}] * 2
    report = made.lines[0].report
    assert report is not None
    assert report.value == 0.0  # the first four samples of the recording
    known = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    recorded = json.loads(RECORDED.read_text())["out"]["samples"]["own_sums"]
    items = [s["acc"] for s in recorded]
    assert any(items == line.get("items", line.get("value", {}).get("items", {})).get("sums") for line in known)


@pytest.mark.parametrize(
    ("broken", "metric", "said"),
    [
        ("raise KeyError('own_sums')", "acc", "ended with code 1: KeyError: 'own_sums'"),
        ("os._exit(0)", "acc", "prints no JSON"),
        ("pass", "acc_nrom", "own_sums has no metric 'acc_nrom'; did you mean"),
        ("pass", "exact_match,flexible", "it has acc,none, acc_norm,none"),
    ],
)
def test_what_goes_wrong_inside_is_said(
    asked: dict[str, Any], tmp_path: Path, broken: str, metric: str, said: str
) -> None:
    (tmp_path / "site" / "lm_eval" / "__init__.py").write_text(LM_EVAL.replace("BREAK", broken))
    asked["score"]["lm_eval"]["metric"] = metric
    with pytest.raises(RecipeError, match="the recipe as it is could not be scored") as error:
        search(asked, tmp_path / "out")
    assert said in str(error.value)


def test_a_python_without_it_is_named(asked: dict[str, Any], tmp_path: Path) -> None:
    asked["score"]["lm_eval"]["python"] = str(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"none has no lm_eval; install it \(pip install lm-eval\)"):
        search(asked, tmp_path / "out")
