"""`weightsmith train multitask`: results, resuming to the bit, the joint row of bench, recipes that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from multitask_cases import bright, first, images, last, save, texts
from safetensors.torch import save_file
from torch import nn

import weightsmith as ws
from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError, RecipeError
from weightsmith.io.read.open import open_source
from weightsmith.train.multitask.build import build, open_body, restore
from weightsmith.train.multitask.data import read_tasks
from weightsmith.train.multitask.recipe import MultiTaskRecipe, loads
from weightsmith.train.multitask.run import fit_system, train_multitask


@pytest.fixture
def words(tmp_path: Path) -> dict[str, Any]:
    """Two classifications of words by a small BERT."""
    tasks = {
        "first": {"data": str(texts(tmp_path / "first.jsonl", 60, first)), "candidates": ["low", "high"]},
        "last": {"data": str(texts(tmp_path / "last.jsonl", 40, last, 1)), "candidates": ["soft", "hard"]},
    }
    return {
        "model": str(save("bert", tmp_path / "bert")),
        "tasks": tasks,
        "steps": 6,
        "every": 3,
        "valid": 0.2,
        "batch": 6,
    }


def write(tmp_path: Path, recipe: dict[str, Any], name: str = "tasks.yaml") -> str:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def state(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        source = open_source(str(file))
        found |= {f"{file.name}:{name}": source.read(name) for name in source.keys}
    return found


# --- results -----------------------------------------------------------------------------------------


def test_a_run_writes_a_model_its_parts_and_every_curve(
    tmp_path: Path, words: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "multitask", write(tmp_path, words), str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in told["rows"]] == [0, 3, 6]
    for name in ("first", "last"):
        assert {f"{name}/valid", f"{name}/score"} <= set(told["rows"][0]["figures"])
    assert "first/loss" in told["rows"][1]["figures"]
    out = tmp_path / "out"
    page = (out / "training.html").read_text()
    assert "Validation score" in page
    assert not (tmp_path / "out.training").exists()
    base, made = open_source(str(tmp_path / "bert")), open_source(str(out))
    assert list(made.keys) == list(base.keys)  # merges take it
    recipe = loads(yaml.safe_dump(words))
    system = restore(out, read_tasks(recipe))
    task = system.tasks["last"]
    assert system.score(task, task.parts["test"], 4) == told["scores"]["last"]
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize("by", ["plain", "uni_perceiver", "task_expert"])
def test_a_broken_run_goes_on_to_the_same_bits(tmp_path: Path, words: dict[str, Any], by: str):
    recipe = loads(yaml.safe_dump({**words, "by": by, "accumulation": 2, "steps": 7}))
    train_multitask(recipe, tmp_path / "whole", device="cpu")

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_multitask(recipe, tmp_path / "broken", ws.Settings(progress=stop), device="cpu")
    assert not (tmp_path / "broken").exists()
    with pytest.raises(OutputError, match="a previous run was interrupted; pass --resume"):
        train_multitask(recipe, tmp_path / "broken", device="cpu")
    found = train_multitask(recipe, tmp_path / "broken", ws.Settings(resume=True), device="cpu")
    assert [row.step for row in found.rows] == [0, 3, 6, 7]
    one, other = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    said = [json.loads((tmp_path / name / "multitask.json").read_text())["scores"] for name in ("whole", "broken")]
    assert said[0] == said[1]


def test_data_that_changed_are_not_resumed(tmp_path: Path, words: dict[str, Any]):
    recipe = loads(yaml.safe_dump(words))

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_multitask(recipe, tmp_path / "out", ws.Settings(progress=stop), device="cpu")
    texts(tmp_path / "last.jsonl", 40, last, 7)
    with pytest.raises(OutputError, match="belongs to a run with another examples"):
        train_multitask(recipe, tmp_path / "out", ws.Settings(resume=True), device="cpu")


def test_both_tasks_are_learnt_and_one_alone_is_a_special_case(tmp_path: Path, words: dict[str, Any]):
    more = {"steps": 120, "every": 120, "batch": 16, "optimizer": {"adamw": {"lr": 0.005}}, "sampling": "mixed"}
    for name, make in (("first", first), ("last", last)):
        texts(Path(words["tasks"][name]["data"]), 300, make)
    found = train_multitask(loads(yaml.safe_dump({**words, **more})), tmp_path / "out", device="cpu")
    assert min(found.scores.values()) > 90
    assert found.skipped == {}


def test_clipping_can_be_left_out(words: dict[str, Any]):
    """Plain gradient steps of a first loss times 100: without a clip the weights go elsewhere."""
    words["tasks"]["first"]["weight"] = 100.0
    found = []
    for clip in (1e-3, "none"):
        recipe = loads(yaml.safe_dump({**words, "steps": 1, "clip": clip, "optimizer": {"adamw": {"eps": 100.0}}}))
        tasks = read_tasks(recipe)
        system = build(recipe, open_body(recipe, tasks), tasks)
        before = [p.clone() for p in system.parameters()]
        fit_system(recipe, system)
        pairs = zip(before, system.parameters(), strict=True)
        found.append(sum(float((a - b).detach().abs().sum()) for a, b in pairs))
    assert found[1] > 100 * found[0] > 0


def test_a_module_from_python_takes_images(tmp_path: Path):
    recipe = MultiTaskRecipe(
        tasks={"one": {"data": str(images(tmp_path / "a.npz", 20, bright, key="y"))}}, steps=2, valid=0.2, batch=4
    )  # fmt: skip
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = module[0].weight.detach().clone()
    result = train_multitask(recipe, tmp_path / "out", module=module)
    assert not torch.equal(before, module[0].weight)
    assert torch.equal(state(result.out)["model.safetensors:0.weight"], module[0].weight)


# --- bench -------------------------------------------------------------------------------------------


def test_the_joint_row_of_bench(tmp_path: Path, words: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    """Experts, their merge with each expert's own head, and the multi-task model, on the same test examples."""
    for name, make in (("first", first), ("last", last)):
        texts(Path(words["tasks"][name]["data"]), 300, make)
        for part, seed in (("valid", 11), ("test", 12)):
            words["tasks"][name][part] = str(texts(tmp_path / f"{name}-{part}.jsonl", 40, make, seed))
    words |= {"steps": 60, "every": 60, "batch": 16, "optimizer": {"adamw": {"lr": 0.003}}}
    scores = {}
    for name in ("joint", "first", "last"):
        tasks = words["tasks"] if name == "joint" else {name: words["tasks"][name]}
        scores[name] = train_multitask(loads(yaml.safe_dump({**words, "tasks": tasks})), tmp_path / name).scores
    write(tmp_path, words)
    study = {
        "title": "words", "base": "bert", "models": {"first": "first", "last": "last"}, "joint": "joint",
        "evaluate": {"tasks": {"recipe": "tasks.yaml"}}, "methods": {"average": "linear"},
    }  # fmt: skip
    assert main(["bench", write(tmp_path, study, "study.yaml"), "--out", str(tmp_path / "bench"), "--json"]) == 0
    rows = {row["name"]: row["tasks"] for row in json.loads(capsys.readouterr().out)[0]["rows"]}
    assert rows["joint training"] == pytest.approx(scores["joint"])
    assert rows["expert first"]["first"] == pytest.approx(scores["first"]["first"])
    assert rows["expert last"]["last"] == pytest.approx(scores["last"]["last"])
    assert set(rows["average"]) == {"first", "last"}
    words["tasks"]["last"].pop("test")
    write(tmp_path, words)
    assert main(["bench", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "bench2")]) == 2
    assert "task 'last' has no test data in" in capsys.readouterr().err


def test_merges_of_prompts_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Base, experts and joint row are prompts of one frozen model: what is merged and scored are the vectors."""
    tasks = {}
    for name, make, seed in (("first", first, 0), ("other", lambda w: "high" if first(w) == "low" else "low", 1)):
        files = {p: str(texts(tmp_path / f"{name}-{p}.jsonl", 12, make, seed)) for p in ("data", "valid", "test")}
        tasks[name] = {**files, "candidates": ["low", "high"]}
    common = {"model": str(save("llama", tmp_path / "llama")), "by": {"prompt": {"n_ctx": 2}}, "answer": 8, "batch": 4,
              "optimizer": {"adamw": {"lr": 0.1}}}  # fmt: skip
    scores = {}
    for name, steps in (("start", 1), ("joint", 8), ("first", 8), ("other", 8)):
        given = {**common, "tasks": {name: tasks[name]} if name in tasks else tasks, "steps": steps, "every": steps}
        scores[name] = train_multitask(loads(yaml.safe_dump(given)), tmp_path / name, device="cpu").scores
    write(tmp_path, {**common, "tasks": tasks, "steps": 8})
    study = {
        "title": "prompts", "base": "start", "models": {"first": "first", "other": "other"}, "joint": "joint",
        "evaluate": {"tasks": {"recipe": "tasks.yaml"}}, "methods": {"average": "linear"},
    }  # fmt: skip
    assert main(["bench", write(tmp_path, study, "study.yaml"), "--out", str(tmp_path / "bench"), "--json"]) == 0
    rows = {row["name"]: row["tasks"] for row in json.loads(capsys.readouterr().out)[0]["rows"]}
    assert rows["base"] == scores["start"]
    assert rows["joint training"] == scores["joint"]
    assert rows["expert other"]["other"] == scores["other"]["other"]
    merged = ws.merge({name: str(tmp_path / name) for name in tasks}, "average")
    save_file(dict(merged), tmp_path / "merged.safetensors")
    system = restore(tmp_path / "first", read_tasks(loads(yaml.safe_dump({**common, "tasks": tasks}))),
                     at=tmp_path / "merged.safetensors", device="cpu")  # fmt: skip
    assert torch.equal(system.own["prompt"].text, merged["prompt.text"])  # type: ignore[arg-type]
    task = system.tasks["first"]
    assert rows["average"]["first"] == system.score(task, task.parts["test"], 4)


# --- what makes no sense -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "tasks is empty; name at least one"),
        ({"model": None}, "takes model or net, one of them"),
        ({"by": "instruckt"}, "by: names no kind, is 'instruckt'; did you mean 'instruct'"),
        ({"optimizer": "mt_adamw", "sampling": "mixed"}, "is mt_adamw, which needs sampling: unmixed"),
        ({"tasks.first.rate": 0.5, "tasks.last.rate": 0.4}, "rates sum to 0.9, not to 1"),
        ({"tasks.first.rate": 0.5}, "tasks.last has no rate, but other tasks do"),
        ({"tasks.first.invalid": 0.0, "tasks.first.legal": [0, 10]}, "is 0, which is a legal value of 0 .. 10"),
        ({"tasks.first.legal": [10, 0]}, "legal is 10 .. 0; write the least value first"),
        ({"tasks.first.invalid": "none"}, "invalid should be a number, or nan; is 'none'"),
        ({"by": "uni_perceiver", "tasks.first.candidates": ["low", "high", "x" * 70]}, "is 6 tokens longer than"),
        ({"tasks.first.candidates": ["low", "low", "high"]}, "task 'first': candidate 'low' stands twice"),
        ({"tasks.first.metric": "rmse"}, "task 'first': metric 'rmse' does not fit its labels"),
        ({"tasks.first.candidates": ["low", "up"]}, "the answer 'high' is none of the candidates"),
        ({"by": "instruct"}, "by: instruct needs a language model"),
        ({"by": "prompt"}, "by: prompt needs a language model or CLIP"),
        ({"by": "conditioned"}, "by: conditioned is for tasks with maps"),
        ({"by": "uni_perceiver", "tasks.first.candidates": None, "tasks.last.data": "IMAGES"}, "has images, but"),
        ({"tasks.first.data": "EMPTY"}, "task 'first' has no examples"),
        ({"tasks.first.data": "MISSING.jsonl"}, "MISSING.jsonl"),
    ],
)
def test_refusals(
    tmp_path: Path, words: dict[str, Any], capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
):
    (tmp_path / "EMPTY").with_suffix(".jsonl").write_text("\n")
    images(tmp_path / "IMAGES.npz", 4, bright, key="y")
    files = {"IMAGES": str(tmp_path / "IMAGES.npz"), "EMPTY": str(tmp_path / "EMPTY.jsonl")}
    for key, value in change.items():
        *path, end = key.split(".")
        place: Any = words
        for step in path:
            place = place[step]
        place[end] = files.get(value, value) if isinstance(value, str) else value
    assert main(["train", "multitask", write(tmp_path, words), str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


def test_data_that_make_no_sense(tmp_path: Path):
    def tasks(file: str, **more: Any) -> Any:
        return read_tasks(MultiTaskRecipe(tasks={"t": {"data": str(tmp_path / file), **more}}))

    (tmp_path / "a.jsonl").write_text('{"input": "x", "label": 3}\n{"input": "y", "label": 0}\n')
    with pytest.raises(RecipeError, match="label 3 numbers none of its 2 candidates"):
        tasks("a.jsonl", candidates=("a", "b"))
    (tmp_path / "b.jsonl").write_text('{"input": "x", "label": 3}\n{"input": "y", "output": "b"}\n')
    with pytest.raises(RecipeError, match="some answers are texts and some are numbers"):
        tasks("b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(RecipeError, match="line 1: needs an input"):
        tasks("c.jsonl")
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 4, 4)))
    with pytest.raises(RecipeError, match=r"needs x with y \(labels\) or target"):
        tasks("d.npz")
    np.savez(tmp_path / "e.npz", x=np.zeros((2, 4, 4)), y=np.zeros(3))
    with pytest.raises(RecipeError, match="2 images but 3 answers"):
        tasks("e.npz")
    for number, y in enumerate(([0.0, 0.9], [[0, 1], [1, 0]], ["a", "b"], [0, np.nan])):
        np.savez(tmp_path / f"y{number}.npz", x=np.zeros((2, 4, 4)), y=np.array(y))
        with pytest.raises(RecipeError, match="a whole number for each image"):
            tasks(f"y{number}.npz")
    np.savez(tmp_path / "two.npz", x=np.zeros((2, 2, 5, 5)), y=np.array([0, 1]))
    with pytest.raises(RecipeError, match="1, 3 or 4 channels"):
        tasks("two.npz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "caf\xe9", "output": "x"}\n')
    with pytest.raises(RecipeError, match="not readable as UTF-8"):
        tasks("latin.jsonl")
    (tmp_path / "lines.jsonl").write_text('{"input": "a\u2028b", "output": "x"}\n', "utf-8")
    assert tasks("lines.jsonl")["t"].parts["train"][0].input == "a\u2028b"
    np.savez(tmp_path / "h.npz", x=np.zeros((1, 4, 4)), target=np.array([[[255, 0], [0, 0]]], dtype=np.uint8))
    with pytest.raises(RecipeError, match=r"map 0 has labels from 0 to 255, outside of legal: 0 .. 9"):
        tasks("h.npz", legal=(0, 9))
    found = tasks("h.npz", legal=(0, 9), invalid=255.0)["t"]  # values as they are stored
    assert found.counts(found.parts["train"][0].answer).tolist() == [[[False, True], [True, True]]]
    np.savez(tmp_path / "i.npz", x=np.zeros((1, 4, 4)), target=np.full((1, 2, 2), np.nan))
    with pytest.raises(RecipeError, match="values that are not finite; name the value of pixels without a label"):
        tasks("i.npz")
    np.savez(tmp_path / "k.npz", x=np.zeros((1, 4, 4)), target=np.array([[[np.nan, 2], [3, 4]]]))
    for nan in ("nan", float("nan")):
        found = tasks("k.npz", invalid=nan, legal=(0, 9))["t"]
        assert found.spec.invalid == "nan"  # JSON has no other
        assert found.counts(found.parts["train"][0].answer).tolist() == [[[False, True], [True, True]]]
    for name, invalid in (("i.npz", "nan"), ("j.npz", 7.0)):
        np.savez(tmp_path / "j.npz", x=np.zeros((1, 4, 4)), target=np.full((1, 2, 2), 7.0))
        with pytest.raises(RecipeError, match="task 't': no pixel of its train maps has a label; is invalid: right"):
            tasks(name, invalid=invalid)
    (tmp_path / "f.csv").write_text("x")
    with pytest.raises(RecipeError, match=r"use \.jsonl or \.npz"):
        tasks("f.csv")
    (tmp_path / "g.npz").write_bytes(b"PK nothing")
    with pytest.raises(RecipeError, match="not a readable"):
        tasks("g.npz")


def test_a_cap_holds_a_giant_task_back(words: dict[str, Any]):
    """Some of its training examples, those of the seed; validation is whole."""
    whole, capped = (read_tasks(loads(yaml.safe_dump({**words, **more}))) for more in ({}, {"cap": 40}))
    assert [len(task.parts["train"]) for task in whole.values()] == [48, 32]
    assert [len(task.parts["train"]) for task in capped.values()] == [40, 32]
    assert {p.input for p in capped["first"].parts["train"]} < {p.input for p in whole["first"].parts["train"]}
    assert [len(task.parts["valid"]) for task in capped.values()] == [12, 8]


def test_a_prompt_knows_its_base(tmp_path: Path):
    """Adapting and scoring refuse another base; a model of other shapes gets no foreign parts."""
    data = str(texts(tmp_path / "a.jsonl", 20, first))
    recipe = {"model": str(save("llama", tmp_path / "llama")), "by": {"prompt": {"n_ctx": 3}}, "steps": 2, "batch": 4,
              "tasks": {"a": {"data": data, "candidates": ["low", "high"]}}, "answer": 8, "valid": 0.3}  # fmt: skip
    source = loads(yaml.safe_dump(recipe))
    out = train_multitask(source, tmp_path / "out").out
    tasks = read_tasks(source)
    system = build(source, open_body(source, tasks), tasks)
    before = {name: p.clone() for name, p in system.base.named_parameters()}
    fit_system(source, system)
    assert all(torch.equal(before[name], p) for name, p in system.base.named_parameters())
    adapt = loads(yaml.safe_dump({**recipe, "by": {"prompt": {"n_ctx": 3, "init": str(out)}}}))
    body = open_body(adapt, tasks)
    again = build(adapt, body, tasks)
    assert torch.equal(again.own["prompt"].text, state(out)["multitask.safetensors:prompt.text"])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="nothing trains"):
        train_multitask(loads(yaml.safe_dump({**recipe, "by": {"prompt": {"n_ctx": 0}}})), tmp_path / "none")
    with pytest.raises(RecipeError, match="a prompt with n_ctx 3, not 4"):
        build(loads(yaml.safe_dump({**recipe, "by": {"prompt": {"n_ctx": 4, "init": str(out)}}})), body, tasks)
    with torch.no_grad():
        next(body.module.parameters()).add_(1)
    with pytest.raises(RecipeError, match="a prompt of another base"):
        build(adapt, body, tasks)
    body.module.save_pretrained(tmp_path / "llama")
    with pytest.raises(OutputError, match="has changed since"):
        restore(out, tasks)
    merged = ws.merge({"a": str(out), "b": str(out)}, "average")  # a prompt is a mergeable artefact
    assert torch.equal(merged["prompt.text"], state(out)["multitask.safetensors:prompt.text"])
