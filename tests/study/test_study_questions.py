"""The study's language models: two files that `bench` takes, from a corpus and models of a few steps."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import study.__main__ as command

from study import questions
from weightsmith.study.schema import load_study
from weightsmith.study.suite_file import bound_tasks, load_run


def test_a_tiny_family_has_files_that_bench_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {kind: tuple(f"{kind} {n} ".encode() * 60 for n in range(4)) for kind in ("Python", "English", "JSON")}
    corpus = {kind: dict.fromkeys(("train", "validation", "test"), found) for kind, found in documents.items()}
    small = {"hidden": 8, "layers": 1, "heads": 2, "mlp": 8, "context": 96, "base_steps": 1, "expert_steps": 2}
    tiny = partial(questions.Training, **small, joint_steps=1, validation=2, test=3)
    monkeypatch.setattr(questions, "Training", tiny)
    monkeypatch.setattr(questions, "texts", lambda home, data: corpus)
    (study,), (wild,) = command.asked(tmp_path, None, 1, lambda text: None)
    assert set(load_study(study).recipe.models) == set(documents)
    run, suite = load_run(wild)
    bound = bound_tasks(run, suite)
    assert (suite.name, set(bound)) == ("in_the_wild", set(documents))
    for one in bound.values():
        lines = [json.loads(line) for line in Path(one.spec.file).read_text("utf-8").split("\n") if line]
        assert len(lines) == 3
        assert all(line["choices"][line["answer"]].strip(" 0123456789") for line in lines)
    fresh = (study.parent / "JSON" / "model.safetensors").read_bytes()
    stopped = study.parent.with_name(f"{study.parent.name}.partial")
    study.parent.rename(stopped)
    for name in ("JSON", "joint"):
        shutil.rmtree(stopped / name)
    told: list[str] = []
    assert command.asked(tmp_path, None, 1, told.append) == ([study], [wild])
    assert [line.split(",")[1].split()[-1] for line in told] == ["JSON", "joint"], "goes on where it was stopped"
    assert (study.parent / "JSON" / "model.safetensors").read_bytes() == fresh
    again = command.asked(tmp_path, None, 1, lambda text: pytest.fail(f"trained again: {text}"))
    assert again == ([study], [wild])
