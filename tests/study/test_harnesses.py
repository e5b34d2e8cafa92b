"""lm_eval and mteb as they answered (recorded from 0.4.13 and 2.26.24), through the real drivers in a process.

A module of each library's name stands in, which checks how it is called and gives the recorded answer; `make torture`
runs the libraries themselves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from weightsmith.core.errors import RecipeError
from weightsmith.study.evaluators.processes import OFFLINE, lm_eval, mteb
from weightsmith.study.evaluators.specs import LmEval, Mteb
from weightsmith.study.evaluators.subject import Setting, Subject

RECORDED = Path(__file__).parent / "recorded"

LM_EVAL = """
import json, os
recorded = json.load(open(RECORDED))
assert all(os.environ[name] == value for name, value in OFFLINE.items())
__version__ = "0.4.13"
def simple_evaluate(**given):
    assert sorted(given) == recorded["keywords"], sorted(given)
    assert given["bootstrap_iters"] == 0 and given["log_samples"] and given["random_seed"] is None
    assert given["model"].told["softmax_dtype"] == "float32" and given["model"].told["batch_size"] == 4
    assert given["model"].told["device"] == "cpu"
    assert given["task_manager"].told["include_defaults"] is False
    BREAK
    return recorded["out"]
"""
MTEB = """
import json
recorded = json.load(open(RECORDED))
__version__ = "2.26.24"
def get_task(name):
    return name
def evaluate(model, tasks, **given):
    assert sorted(given) == recorded["keywords"], sorted(given)
    assert given["cache"] is None and given["encode_kwargs"] == {"batch_size": 4}
    return type("R", (), {"task_results": [type("T", (), {"scores": recorded["scores"]})]})
"""
KEEPS = "class {}:\n    def __init__(self, *words, **told):\n        self.told = told\n"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A python whose lm_eval and mteb are the recordings; returns its path."""
    room = tmp_path / "site"
    for name, text in (
        ("lm_eval/__init__.py", LM_EVAL), ("lm_eval/models/__init__.py", ""), ("mteb/__init__.py", MTEB),
        ("lm_eval/models/huggingface.py", KEEPS.format("HFLM")), ("lm_eval/tasks.py", KEEPS.format("TaskManager")),
        ("torch.py", "class cuda:\n    is_available = staticmethod(lambda: False)\n"),
        ("sentence_transformers.py", KEEPS.format("SentenceTransformer")),
    ):  # fmt: skip
        file = room / name
        file.parent.mkdir(parents=True, exist_ok=True)
        recorded = repr(str(RECORDED / f"{file.parent.name}.json"))
        file.write_text(text.replace("RECORDED", recorded).replace("OFFLINE", repr(OFFLINE)).replace("BREAK", ""))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={room} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def subject(folder: Path, **more: object) -> Subject:
    return Subject("m", folder, Setting(batch=4, **more))  # type: ignore[arg-type]


def test_lm_eval_is_called_and_read_as_recorded(tmp_path: Path, stand_in: Path) -> None:
    found = lm_eval(subject(tmp_path), LmEval(task="own_sums", include=str(tmp_path)), str(stand_in))
    recorded = json.loads((RECORDED / "lm_eval.json").read_text())
    assert found.metrics == recorded["answer"]["metrics"] == {"acc": 1 / 3, "acc_norm": 1 / 3}
    assert found.examples["acc"] == [s["acc"] for s in recorded["out"]["samples"]["own_sums"]]
    assert found.errors["acc"] == pytest.approx((1 / 3 * 2 / 3 / 11) ** 0.5), "lm_eval says N/A: it is calculated"


def test_mteb_is_called_and_read_as_recorded(tmp_path: Path, stand_in: Path) -> None:
    found = mteb(subject(tmp_path), Mteb(task="STSBenchmark"), str(stand_in))
    assert found.metrics["cosine_spearman"] == found.metrics["main_score"] == 0.3
    assert "hf_subset" not in found.metrics


def test_what_goes_wrong_inside_is_said(tmp_path: Path, stand_in: Path) -> None:
    module = tmp_path / "site" / "lm_eval" / "__init__.py"
    text = module.read_text()
    spec = LmEval(task="own_sums", include=str(tmp_path), seconds=5)
    for broken, said in (
        ("raise KeyError('own_sums')", "lm_eval own_sums: ended with code 1: KeyError: 'own_sums'"),
        ("import os; os._exit(0)", "lm_eval own_sums: ended without an answer"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with code -9"),
    ):
        module.write_text(text.replace("    \n    return recorded", f"    {broken}\n    return recorded"))
        with pytest.raises(RecipeError, match=said):
            lm_eval(subject(tmp_path), spec, str(stand_in))
    with pytest.raises(RecipeError, match="No such file"):
        lm_eval(subject(tmp_path), spec, str(tmp_path / "no-python"))
    with pytest.raises(RecipeError, match="the template is plain or chat"):
        lm_eval(subject(tmp_path, template="Q: {prompt}"), spec, str(stand_in))
