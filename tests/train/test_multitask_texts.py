"""Instructions within a budget, language models told the task in words, soft prompts: laws and toys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multitask_cases import first, images, save, texts
from torch import Tensor

from kit import noise
from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask import (
    Instruction,
    Shown,
    SoftPrompt,
    average_prompts,
    masked_labels,
    render,
    task_groups,
    transfer_matrix,
)
from weightsmith.train.multitask.build import build, open_body, restore
from weightsmith.train.multitask.data import Pair, read_tasks
from weightsmith.train.multitask.instruct import without_shown
from weightsmith.train.multitask.prompt import accepted, deepened, layers_of, placed
from weightsmith.train.multitask.recipe import MultiTaskRecipe
from weightsmith.train.multitask.rows import bins
from weightsmith.train.multitask.run import fit_system, train_multitask
from weightsmith.train.multitask.system import System

# --- rendering ---------------------------------------------------------------------------------------

GIVEN = Instruction(
    "Name the drug.", "Write one word.", (Shown("a b", "b", "b heals"), Shown("c", "none", "nothing heals"))
)
WHOLE = """Name the drug.
Write one word.
Input: a b Output: b Explanation: b heals
Input: c Output: none Explanation: nothing heals
Input: take aspirin
Output:"""


def test_a_rendered_input():
    assert render(GIVEN, "take aspirin", limit=1000) == WHOLE
    assert render(None, "x", limit=100, mode="none") == "Input: x\nOutput:"
    assert render(GIVEN, "x", limit=1000, mode="instruction") == "Name the drug.\nWrite one word.\nInput: x\nOutput:"


def test_the_budget_cuts_in_order():
    """Explanations from the last, then examples from the last, then the middle of the text; nothing else."""
    seen = [render(GIVEN, "take aspirin daily " * 4, limit=n) for n in range(230, 60, -1)]
    assert all(len(text) <= n for text, n in zip(seen, range(230, 60, -1), strict=True))
    kinds = list(dict.fromkeys((t.count("Explanation"), t.count("Input:"), " ... " in t) for t in seen))
    assert kinds == [(2, 3, False), (1, 3, False), (0, 3, False), (0, 2, False), (0, 1, False), (0, 1, True)]
    assert all(t.startswith("Name the drug.\nWrite one word.\n") and t.endswith("\nOutput:") for t in seen)
    tight = render(GIVEN, "abcdefghijklmnop" * 9, limit=80)
    assert len(tight) == 80  # as much of the text as fits
    assert "Input: abcd" in tight
    assert tight.endswith("mnop\nOutput:")
    with pytest.raises(RecipeError, match=r"task 't': its instruction alone takes 46 of 30 tokens; shorten"):
        render(GIVEN, "x", limit=30, task="t")
    with pytest.raises(RecipeError, match="task 't' has no instruction"):
        render(None, "x", limit=30, task="t")


def test_shown_examples_are_not_scored():
    assert without_shown(GIVEN, ["a  b", "b", "c"]) == [1]


# --- language models ---------------------------------------------------------------------------------


def made(tmp_path: Path, kind: str, recipe: dict[str, Any]) -> tuple[MultiTaskRecipe, System]:
    place = tmp_path / kind
    asked = MultiTaskRecipe(model=str(place if place.exists() else save(kind, place)), **recipe)
    tasks = read_tasks(asked)
    body = open_body(asked, tasks, device="cpu")
    return asked, build(asked, body, body.prepared(tasks))


def contradictory(tmp_path: Path) -> dict[str, Any]:
    """The same inputs, opposite answers."""

    def other(word: str) -> str:
        return "high" if first(word) == "low" else "low"

    answers = {"up": (first, "Aa"), "down": (other, "Zz")}
    return {
        name: {
            "data": str(texts(tmp_path / f"{name}.jsonl", 240, make)),
            "candidates": ("low", "high"),
            "instruction": told,
        }
        for name, (make, told) in answers.items()
    }


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_loss_ignores_the_input(tmp_path: Path, kind: str):
    """It is that of the answer's tokens alone, batched with padding or one by one."""
    _, system = made(tmp_path, kind, {"tasks": contradictory(tmp_path), "by": "instruct", "answer": 8, "valid": 0.3})
    task: Any = system.tasks["up"]
    pairs = [Pair("abcd", 0), Pair("hgfedcba", 1)]
    value, count = system.loss(task, pairs)
    assert count == sum(len(system._target(w)) for w in ("low", "high"))  # type: ignore[operator]
    alone = [system.loss(task, [pair])[0] for pair in pairs]
    torch.testing.assert_close(value, sum(alone), rtol=1e-5, atol=1e-4)
    if kind == "llama":
        source, target = system._source(task, "abcd"), system._target("low")  # type: ignore[operator]
        logits = system.body.module(torch.tensor([[*source, *target]])).logits[0].log_softmax(-1)
        want = -sum(logits[len(source) + i - 1, t] for i, t in enumerate(target))
        torch.testing.assert_close(alone[0], want, rtol=1e-5, atol=1e-4)


def test_instructions_part_contradictory_tasks(tmp_path: Path):
    fast = {"tasks": contradictory(tmp_path), "batch": 16, "every": 1000, "answer": 8, "valid": 0.3,
            "optimizer": {"adamw": {"lr": 0.005}}, "sampling": "concat"}  # fmt: skip
    found = {}
    for mode, steps in (("none", 60), ("instruction", 300)):
        recipe, system = made(tmp_path, "llama", {**fast, "steps": steps, "by": {"instruct": {"mode": mode}}})
        fit_system(recipe, system)
        found[mode] = [system.score(task, task.parts["valid"][:60], 60) for task in system.tasks.values()]
    assert sum(found["none"]) / 2 <= 55
    assert min(found["instruction"]) >= 95


def test_a_seed_gives_its_losses(tmp_path: Path):
    rows = []
    for seed in (1, 1, 2):
        more = {"steps": 3, "every": 1, "batch": 4, "examples": 4, "answer": 8, "valid": 0.3, "seed": seed}
        recipe, system = made(tmp_path, "llama", {"tasks": contradictory(tmp_path), "by": "instruct", **more})
        rows.append([(row.loss, row.figures) for row in fit_system(recipe, system)[0]])
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_greedy_decoding_is_that_of_transformers(tmp_path: Path, kind: str):
    tasks = {"copy": {"data": str(texts(tmp_path / "c.jsonl", 10, lambda w: w[:2])), "instruction": "copy"}}
    _, system = made(tmp_path, kind, {"tasks": tasks, "by": "instruct", "answer": 6, "valid": 0.3})
    source = system._source(system.tasks["copy"], "abc")  # type: ignore[operator]
    ours = system._greedy([source, source * 2])[0]  # type: ignore[operator]
    ids = torch.tensor([source])
    theirs = system.body.module.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=system.body.end, pad_token_id=0
    )[0]
    theirs = theirs.tolist()[1 if kind == "t5" else len(source) :]
    assert ours == (theirs[: theirs.index(system.body.end)] if system.body.end in theirs else theirs)


def test_answers_that_are_cut_are_told(tmp_path: Path):
    tasks: Any = {"t": {"data": str(texts(tmp_path / "c.jsonl", 10, lambda w: w + w))}}
    recipe = {"tasks": tasks, "answer": 4, "valid": 0.3}
    assert made(tmp_path, "llama", recipe)[1].notes == ["t: 7 of 7 answers are cut to 4 tokens"]
    tasks["t"]["candidates"] = [f"{word}{word}" for word in dict.fromkeys(map(str, range(3)))]
    texts(tmp_path / "c.jsonl", 10, lambda w: "00")
    assert made(tmp_path, "llama", recipe)[1].notes == []
    with pytest.raises(RecipeError, match="some candidates are alike in their first 1 tokens; raise answer"):
        made(tmp_path, "llama", {**recipe, "answer": 1})


def test_a_candidate_that_begins_like_another_can_lose(tmp_path: Path):
    """Costs include the end token: else the shorter of "a" and "ab" would always win."""
    tasks = {
        "t": {
            "data": str(texts(tmp_path / "c.jsonl", 40, lambda w: "ab" if w[0] < "g" else "a")),
            "candidates": ("a", "ab"),
        }
    }
    recipe, system = made(tmp_path, "llama", {"tasks": tasks, "answer": 4, "valid": 0.3, "steps": 60, "batch": 16,
                                              "every": 1000, "optimizer": {"adamw": {"lr": 0.01}}})  # fmt: skip
    fit_system(recipe, system)
    assert 1 in system.predict(system.tasks["t"], system.tasks["t"].parts["valid"])


# --- prompts -----------------------------------------------------------------------------------------

LIGHT = ("dark", "light")


def lit(image: np.ndarray, channel: int | None = None) -> Any:
    part = image if channel is None else image[..., channel]
    return int(part.mean() > 127.5)


def levels(path: Path, count: int, label: Any, seed: int) -> str:
    """Images of one colour each, and a class."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    np.savez(path, x=x, y=[label(one) for one in x])
    return str(path)


def clip(tmp_path: Path, data: str, **more: Any) -> tuple[MultiTaskRecipe, System]:
    by = {"prompt": {"n_ctx": 4, **more.pop("prompt", {})}}
    given = {"steps": 150, "batch": 16, "every": 1000, "valid": 0.2, "optimizer": {"adamw": {"lr": 0.02}}} | more
    spec = {"data": data, "candidates": given.pop("candidates", LIGHT)} | given.pop("spec", {})
    return made(tmp_path, "clip", {"tasks": {"t": spec}, "by": by, **given})


@pytest.mark.parametrize("kind", ["text", "visual", "unified"])
def test_no_vectors_give_the_model_as_it_is(tmp_path: Path, kind: str):
    data = str(images(tmp_path / "a.npz", 8, lit, key="y"))
    _, system = clip(tmp_path, data, prompt={"kind": kind, "n_ctx": 0})
    pairs = system.tasks["t"].parts["train"]
    with torch.no_grad():
        found = system.logits(system.tasks["t"], pairs)  # type: ignore[operator]
        rows = [[*name.encode(), 255] for name in LIGHT]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True)
        pixels = torch.stack([p.input for p in pairs if isinstance(p.input, Tensor)])
        want = system.body.module(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "visual", "unified"])
def test_only_the_prompt_learns_and_it_goes_on_as_it_was(tmp_path: Path, kind: str):
    data = levels(tmp_path / "a.npz", 80, lit, 0)
    recipe, system = clip(tmp_path, data, prompt={"kind": kind}, steps=30)
    before = {name: p.clone() for name, p in system.named_parameters()}
    fit_system(recipe, system)
    changed = {name.split(".")[0] for name, p in system.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"own"}
    out = train_multitask(recipe, tmp_path / "out", device="cpu").out
    again = restore(out, system.tasks)
    pairs = system.tasks["t"].parts["valid"]
    with torch.no_grad():
        torch.testing.assert_close(again.logits(again.tasks["t"], pairs), system.logits(system.tasks["t"], pairs))  # type: ignore[operator]
    assert not (out / "model.safetensors").exists()


def test_a_related_source_helps_a_few_shots(tmp_path: Path):
    """Four examples of a target: more than from scratch after the same decision's prompt; not after another's."""
    sources = {"related": lambda x: lit(x, 0), "unrelated": lambda x: 1 - lit(x, 0)}
    target, test = (
        levels(tmp_path / "t.npz", 4, lambda x: lit(x, 0), 40),
        levels(tmp_path / "v.npz", 200, lambda x: lit(x, 0), 41),
    )
    found = {}
    for name in ("scratch", *sources):
        init = {}
        if name in sources:
            recipe, _ = clip(tmp_path, levels(tmp_path / "s.npz", 200, sources[name], 42))
            init = {"init": str(train_multitask(recipe, tmp_path / name, device="cpu").out)}
        recipe, system = clip(
            tmp_path, target, prompt=init, steps=10, batch=4, spec={"valid": test}, optimizer={"adamw": {"lr": 0.002}}
        )
        fit_system(recipe, system)
        found[name] = system.score(system.tasks["t"], system.tasks["t"].parts["valid"], 64)
    assert found["related"] > found["scratch"] + 10
    assert found["unrelated"] <= found["scratch"]


def test_labels_of_other_tasks_get_nothing():
    logits = noise(3, 5)
    p = masked_labels(logits, ["a", "b", "a"], {"a": slice(0, 2), "b": slice(2, 5)}).softmax(-1)
    assert p[[0, 2], 2:].abs().max() == 0
    assert p[1, :2].abs().max() == 0
    torch.testing.assert_close(p[0, :2], logits[0, :2].softmax(-1))


def test_places_of_class_names():
    assert placed([7, 8], 3, "middle", 0) == ([0, 7, 8, 0, 0], [0, 3, 4])
    assert placed([7, 8], 2, "end", 0) == ([0, 0, 7, 8], [0, 1])
    assert placed([7], 2, "front", 0) == ([7, 0, 0], [1, 2])


def test_names_that_are_too_long(tmp_path: Path):
    data = str(images(tmp_path / "a.npz", 8, lit, key="y"))
    with pytest.raises(
        RecipeError, match=r"task 't': class 'a very very long name' and 4 vectors take 26 tokens of 24; shorten"
    ):
        clip(tmp_path, data, candidates=("dark", "a very very long name"))


def test_prompts_from_one_start_are_averaged():
    one, other = ({"text": noise(2, 3, seed=s)} for s in (0, 1))
    torch.testing.assert_close(average_prompts([one, other], ["h", "h"])["text"], (one["text"] + other["text"]) / 2)
    with pytest.warns(UserWarning, match="started from different values: their average has no meaning"):
        average_prompts([one, other], ["h", "g"])
    with pytest.raises(RecipeError, match="different kinds or sizes"):
        average_prompts([one, {"visual": noise(2, 3)}], ["h", "h"])
    with pytest.raises(RecipeError, match="a unified prompt needs the width"):
        SoftPrompt("unified", 2, text=4)


def test_planted_groups_are_found():
    names = ["cat", "digit", "dog", "number"]
    kind = {"cat": 0, "dog": 0, "digit": 1, "number": 1}
    draw = np.random.default_rng(0)

    def adapted(source: str | None, target: str) -> float:
        gain = 0.0 if source is None else 5.0 if kind[source] == kind[target] else -3.0
        return 60 + gain + draw.normal(0, 0.5)

    transfer = transfer_matrix(names, adapted)
    assert transfer.shape == (4, 4)
    groups = task_groups(transfer, names)
    assert groups == [["cat", "dog"], ["digit", "number"]]
    joint, alone = {"cat": 2.0, "dog": 1.0, "digit": 1.0, "number": 0.0}, dict.fromkeys(names, 1.0)
    assert accepted(groups, joint, alone) == [["cat", "dog"], ["digit"], ["number"]]


# --- rows of tokens ------------------------------------------------------------------------------------

ASKED = ("Which half of the alphabet does it begin with?", "low", "high")


def asked(tmp_path: Path, **more: Any) -> tuple[Any, Any, Any]:
    tasks = {"t": {"data": str(texts(tmp_path / "a.jsonl", 20, first)), "instruction": ASKED[0],
                   "candidates": ASKED[1:]}}  # fmt: skip
    recipe, system = made(tmp_path, "llama", {"tasks": tasks, "by": "instruct", "answer": 6, **more})
    return recipe, system, system.tasks["t"]


@pytest.mark.parametrize("deep", [None, False, True])
def test_what_all_inputs_begin_with_runs_once(tmp_path: Path, deep: bool | None):
    by = {} if deep is None else {"by": {"prompt": {"n_ctx": 3, "deep": deep}}}
    _, system, task = asked(tmp_path, **by)
    sources = [system._source(task, word) for word in ("abc", "hgfed", "a")]
    targets = [system._target(name) for name in ("low", "high", "low")]
    shared = system._shared(sources)
    assert shared.skip == (len(ASKED[0]) if deep is None else 0) + len("\nInput: ") - (deep is not None)
    with torch.no_grad():
        whole, split = system._costs(sources, targets), system._costs(sources, targets, shared)
    torch.testing.assert_close(split.sum(1), whole.sum(1), rtol=1e-5, atol=1e-5)
    assert system._greedy(sources, shared) == system._greedy(sources)
    seen: list[int] = []
    system.body.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[next(n for n in kwargs if n.startswith("input"))].shape[1]),
        with_kwargs=True,
    )
    system.predict(task, task.parts["train"][:5])
    assert len(seen) == 2
    assert seen[1] < len(sources[1])


def test_packed_examples_cost_what_they_cost_alone(tmp_path: Path):
    _, plain, task = asked(tmp_path)
    _, system, _ = asked(tmp_path, packing=True, length=200)
    pairs = task.parts["train"][:7]
    seen: list[torch.Size] = []
    hook = lambda module, args, kwargs: seen.append(args[0].shape)  # noqa: E731
    system.body.module.register_forward_pre_hook(hook, with_kwargs=True)
    found, wanted = ([*one.loss(task, pairs)] for one in (system, plain))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert found[1] == wanted[1]
    found[0].backward()
    wanted[0].backward()
    for (name, p), q in zip(system.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert seen[0][0] < 7
    assert {len(group) for group in bins([30, 30, 20, 10], 60)} == {2}
    assert bins([70, 1, 60], 60) == [[0], [2], [1]]


def test_packing_is_refused_where_it_cannot_be(tmp_path: Path):
    tasks = {"t": {"data": str(texts(tmp_path / "a.jsonl", 20, first))}}
    for kind, by in (("t5", "plain"), ("bert", "plain"), ("llama", {"prompt": {"n_ctx": 2}})):
        if kind == "bert":
            tasks["t"]["candidates"] = ("low", "high")
        with pytest.raises(RecipeError, match="packing: is for"):
            made(tmp_path, kind, {"tasks": tasks, "packing": True, "by": by})


@pytest.mark.parametrize("kind", ["text", "visual"])
def test_every_layer_reads_vectors_of_its_own(tmp_path: Path, kind: str):
    data = levels(tmp_path / "a.npz", 40, lit, 0)
    recipe, system = clip(tmp_path, data, prompt={"kind": kind, "n_ctx": 2, "deep": True}, steps=4)
    prompt = system.own["prompt"]
    assert prompt.deep.shape == (1, 2, 32)  # type: ignore[union-attr]
    before = prompt.deep.detach().clone()  # type: ignore[union-attr,operator]
    fit_system(recipe, system)
    assert not torch.equal(prompt.deep, before)  # type: ignore[arg-type]
    out = train_multitask(recipe, tmp_path / "out", device="cpu").out
    again = restore(out, system.tasks)
    with torch.no_grad():
        pairs = system.tasks["t"].parts["valid"]
        torch.testing.assert_close(again.logits(again.tasks["t"], pairs), system.logits(system.tasks["t"], pairs))  # type: ignore[operator]
    with pytest.raises(RecipeError, match="a prompt with deep True, not False"):
        clip(tmp_path, data, prompt={"kind": kind, "n_ctx": 2, "init": str(out)})
    with pytest.raises(RecipeError, match="a unified prompt has no vectors for later layers"):
        clip(tmp_path, data, prompt={"kind": "unified", "deep": True})


def test_vectors_of_a_later_layer_stand_in_the_prompts_places(tmp_path: Path):
    """A model whose second layer reads what it would have read anyway gives the same."""
    tasks = {"t": {"data": str(texts(tmp_path / "a.jsonl", 10, first))}}
    _, system = made(tmp_path, "llama", {"tasks": tasks, "by": {"prompt": {"n_ctx": 3, "deep": True}}})
    ids = {"input_ids": torch.arange(8)[None]}
    layers, kept = layers_of(system.body.module), []
    layers[1].register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    with torch.no_grad():
        want = system.body.module(**ids).logits
        with deepened(layers, kept[0][:, 2:5], slice(2, 5)):
            same = system.body.module(**ids).logits
        with deepened(layers, kept[0][:, 2:5] + 1, slice(2, 5)):
            other = system.body.module(**ids).logits
    assert torch.equal(same, want)
    assert torch.equal(other[:, :2], want[:, :2])
    assert not torch.allclose(other[:, 2:], want[:, 2:], atol=1e-3)
