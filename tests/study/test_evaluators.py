"""The built-in evaluators against closed forms and against plain loops over a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_toy import CHOICES, language_model, lines, subject

from weightsmith.core.errors import NumericError, RecipeError, SourceError
from weightsmith.study.evaluate import function
from weightsmith.study.evaluators import svg_tasks
from weightsmith.study.evaluators.code_tasks import code, pass_at_k, passes
from weightsmith.study.evaluators.language import Target, language
from weightsmith.study.evaluators.measure import in_memory, measure
from weightsmith.study.evaluators.specs import (
    EVALUATORS,
    Bytes,
    Choices,
    Code,
    Generate,
    Svg,
    Texts,
)
from weightsmith.study.evaluators.subject import Setting, Subject
from weightsmith.study.evaluators.text_tasks import choices, generate, gsm8k_answer, likelihood


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("lm"), tokenizer=False)


def by_hand(folder: Path, prompt: str, target: str) -> float:
    """log P(target | prompt), one sequence, no padding."""
    module = subject(folder).loaded("causal-lm").module
    ids = torch.tensor([list((prompt + target).encode())])
    with torch.no_grad():
        rows = module(input_ids=ids).logits[0].double().log_softmax(-1)
    start = len(prompt.encode())
    return sum(float(rows[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))


def test_likelihoods_do_not_depend_on_their_batch(folder: Path) -> None:
    pairs = [("2+2=", "4"), ("a much longer prompt than the others: ", "and a longer target"), ("é", "ü"), ("x", "yz")]
    for batch in (1, 3, 16):
        found, cut = language(subject(folder, batch=batch)).targets(pairs)
        assert cut == 0
        for one, (prompt, target) in zip(found, pairs, strict=True):
            assert one.log_likelihood == pytest.approx(by_hand(folder, prompt, target), abs=1e-4)
            assert one.tokens == one.bytes == len(target.encode())


def test_a_prompt_that_is_too_long_loses_its_beginning_and_that_is_counted(folder: Path) -> None:
    found, cut = language(subject(folder)).targets([("x" * 999 + "2+2=", "4")])
    assert cut == 1
    kept = ("x" * 999 + "2+2=")[-256:]
    assert found[0].log_likelihood == pytest.approx(by_hand(folder, kept, "4"), abs=1e-4)
    with pytest.raises(RecipeError, match="the model has 256 positions"):
        language(subject(folder)).targets([("x", "y" * 300)])


def test_choices(folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "c.jsonl", CHOICES)
    found = choices(subject(folder), Choices(file=file, joint=""))
    wanted = []
    for item in CHOICES:
        sums = [by_hand(folder, str(item["question"]), text) for text in item["choices"]]  # type: ignore[attr-defined]
        wanted.append(float(sums.index(max(sums)) == item["answer"]))
    assert found.examples["acc"] == wanted
    assert found.metrics["acc"] == pytest.approx(sum(wanted) / len(wanted))
    assert len(choices(subject(folder, limit=5), Choices(file=file)).examples["acc"]) == 5
    for answer in (0, "A", "a ", str(CHOICES[0]["choices"][0])):  # type: ignore[index]
        one = lines(tmp_path / "one.jsonl", [{**CHOICES[0], "answer": answer}])
        assert choices(subject(folder), Choices(file=one, joint="")).examples["acc"] == wanted[:1]


def test_choices_that_stand_twice_are_right_twice_and_lines_end_at_line_feeds_only(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "d.jsonl"
    item = {"question": "a\u2028b\x85", "choices": ["c", "c"], "answer": 1}
    file.write_text(json.dumps(item, ensure_ascii=False) + "\r\n", "utf-8")
    assert choices(subject(folder), Choices(file=str(file))).metrics == {"acc": 1.0, "acc_norm": 1.0}


def test_likelihood_of_texts(folder: Path, tmp_path: Path) -> None:
    items = [{"prompt": "ab", "target": "cd"}, {"text": "hello"}]
    found = likelihood(subject(folder), Texts(file=lines(tmp_path / "t.jsonl", items)))
    nats = by_hand(folder, "ab", "cd") + by_hand(folder, "h", "ello")
    assert found.metrics["bits_per_byte"] == pytest.approx(-nats / 6 / torch.log(torch.tensor(2.0)).item(), rel=1e-4)
    assert found.metrics["perplexity"] == pytest.approx(2 ** found.metrics["bits_per_byte"], rel=1e-3)
    assert 0 <= found.metrics["exact"] <= found.metrics["token_accuracy"] <= 1


def test_greedy_generation_is_the_plain_loop(folder: Path) -> None:
    model = language(subject(folder, batch=2))
    prompts = ["2+2=", "a longer prompt, ", "x"]
    written, notes = model.written(prompts, 12)
    for prompt, text in zip(prompts, written, strict=True):
        ids = list(prompt.encode())
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model.loaded.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        made = ids[len(prompt.encode()) :]
        made = made[: made.index(0)] if 0 in made else made
        assert text == bytes(made).decode(errors="replace")
    assert notes.get("answers cut off", 0) <= 3
    letter = next(c for text in written for c in text if c != "�")
    stopped, _ = model.written(prompts, 12, [letter])
    assert stopped == [text.partition(letter)[0] for text in written]


def test_sampling_repeats_itself_by_its_seed(folder: Path) -> None:
    model = language(subject(folder))
    one, _ = model.written(["x"] * 3, 16, temperature=1.0, seed=1)
    assert one == model.written(["x"] * 3, 16, temperature=1.0, seed=1)[0]
    assert one != model.written(["x"] * 3, 16, temperature=1.0, seed=2)[0]
    assert len(set(one)) > 1


def test_a_model_of_nan_is_an_error_of_the_model(folder: Path) -> None:
    loaded = subject(folder)
    state = {name: value * float("nan") for name, value in loaded.loaded("causal-lm").module.state_dict().items()}
    broken = Subject("broken", folder, loaded.setting, state)
    with pytest.raises(NumericError, match="broken: a likelihood is nan"):
        language(broken).targets([("a", "b")])


def test_in_memory_and_from_a_folder_are_the_same(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = lines(tmp_path / "c.jsonl", CHOICES)
    state = load_file(folder / "model.safetensors")
    held = choices(Subject("m", folder, Setting(device="cpu"), state), Choices(file=file))
    assert held == choices(subject(folder), Choices(file=file))
    assert in_memory("choices")
    assert not in_memory("lm_eval")
    assert not in_memory("program")
    with pytest.raises(SourceError, match="is in memory only"):
        Subject("m", folder, Setting(), state).path()


def test_templates(folder: Path) -> None:
    assert language(subject(folder, template="<{prompt}>")).prompt("hi") == "<hi>"
    with pytest.raises(RecipeError, match="tiny has no chat template"):
        language(subject(folder, template="chat")).prompt("hi")


# --- answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("so 3 + 4 = 7\n#### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("It costs $18.", None, "18"),
        ("#### -5\n#### 6", "-5", "6"),
        ("####10.50.", "10.50", "10.50"),
        ("no number", None, None),
        ("#### none, 3", None, "3"),
        ("... $$ ,,", None, None),
    ],
)
def test_gsm8k_answers(text: str, strict: str | None, loose: str | None) -> None:
    assert gsm8k_answer(text) == strict
    assert gsm8k_answer(text, flexible=True) == loose


def test_exact_match_by_rules(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.study.evaluators.language import Language

    said = ["so 2+2=4", '{"a": [1, 2]}', "Yes. "]
    monkeypatch.setattr(Language, "written", lambda self, prompts, *more, **named: (said[: len(prompts)], {}))
    gsm = lines(tmp_path / "g.jsonl", [{"question": "2+2?", "answer": "2+2=<<4>>4\n#### 4"}])
    found = generate(subject(folder), Generate(file=gsm, rule="gsm8k"))
    assert (found.metrics["exact_match"], found.metrics["flexible_extract"]) == (0.0, 1.0)
    items = [{"question": "", "answer": one} for one in ("2+2=4", '{"a":[1,2]}', "Yes.")]
    file = lines(tmp_path / "e.jsonl", items)
    quoted = lines(tmp_path / "j.jsonl", [{"question": "", "answer": one} for one in ("[1]", '{"a":[1,2]}', '"Yes."')])
    for said_in, rule, hits in ((file, "exact", [0, 0, 1]), (file, "contains", [1, 0, 1]), (quoted, "json", [0, 1, 0])):
        assert generate(subject(folder), Generate(file=said_in, rule=rule)).examples["exact_match"] == hits  # type: ignore[arg-type]
    for rule, answer, why in (("gsm8k", "four", "has no number behind '####'"), ("json", "Yes.", "is not valid JSON"),
                              ("contains", " ", "is empty, which everything contains")):  # fmt: skip
        wrong = lines(tmp_path / "w.jsonl", [{"question": "2+2?", "answer": answer}])
        with pytest.raises(SourceError, match=rf"w\.jsonl, example 1: .*{why}"):
            generate(subject(folder), Generate(file=wrong, rule=rule))  # type: ignore[arg-type]


BAD = [
    ("", "no example in it"),
    ("{", "line 1: not valid JSON"),
    ("[1]", "line 1: should be an object, is list"),
    ('{"question": "a", "choices": ["b", "c"]}', "example 1: has no 'answer'"),
    ('{"qestion": "a", "choices": ["b", "c"], "answer": 0}', "has no 'question'; did you mean 'qestion'?"),
    ('{"question": "a", "choices": ["b"], "answer": 0}', "a list of two texts or more"),
    ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is none of the 2 choices"),
    ('{"question": "a", "choices": ["b", "c"], "answer": true}', "answer True is none"),
    ('{"question": 3, "choices": ["b", "c"], "answer": 0}', "question should be a text, is int"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said[:20] for _, said in BAD])
def test_bad_lines_are_named(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(SourceError, match=r"bad\.jsonl") as error:
        choices(subject(folder), Choices(file=str(tmp_path / "bad.jsonl")))
    assert said in str(error.value)


# --- programs ----------------------------------------------------------------------------------------


def test_pass_at_k() -> None:
    assert pass_at_k(10, 0, 1) == 0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 10) == 1
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),
        ("while True: pass", False),
        ("x = 'a' * (2 << 30)", False),
        ("open('big', 'wb').write(b'x' * (8 << 20))", False),
        ("open('small', 'w').write('x')", True),
        ("import os; assert 'HOME' not in os.environ", True),
        ("assert input() == ''", False),
        ("this is no python", False),
        ("raise KeyboardInterrupt", False),
    ],
)
def test_programs_within_limits(program: str, right: bool) -> None:
    assert passes(program, 1.0, 512) is right


def test_code_runs_what_is_written_behind_the_prompt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightsmith.study.evaluators.language import Language

    wrote = iter([["    return a + b\n"], ["    return a - b\n"]])
    monkeypatch.setattr(Language, "written", lambda self, *words, **named: (next(wrote), {}))
    test = "def check(f):\n    assert f(2, 3) == 5\n"
    file = lines(tmp_path / "h.jsonl", [{"prompt": "def add(a, b):\n", "test": test, "entry_point": "add"}])
    found = code(subject(folder), Code(file=file, samples=2, k=2))
    assert found.metrics == {"pass@1": 0.5, "pass@2": 1.0}


# --- SVG ---------------------------------------------------------------------------------------------


class Scripted:
    """A language model that says what it is told, and always likes the choice that comes first in the alphabet."""

    def __init__(self, says: Any) -> None:
        self.says = says

    def written(self, prompts: Sequence[str], *words: Any, **named: Any) -> tuple[list[str], dict[str, float]]:
        return [self.says(at, prompt) for at, prompt in enumerate(prompts)], {}

    def lengths(self, texts: Sequence[str]) -> list[float]:
        return [float(len(text)) for text in texts]

    def targets(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Target], int]:
        return [Target(-float(ord(target.strip()[0])), 1, 0, 1) for _, target in pairs], 0


def scripted(monkeypatch: pytest.MonkeyPatch, spec: Svg, says: Any) -> dict[str, float]:
    monkeypatch.setattr(svg_tasks, "language", lambda subject: Scripted(says))
    return dict(svg_tasks.svg(Subject("m", Path(), Setting()), spec).metrics)


def test_svg_editing(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.study.svg.scenes import OPERATIONS, edit

    names = list(OPERATIONS)
    spec = Svg(task="edit", count=12)
    right = scripted(monkeypatch, spec, lambda at, prompt: edit(0, at, names[at % 6]).answer)
    assert (right["one_minus_mse"], right["validity"], right["unchanged"]) == (1.0, 1.0, 0.0)
    assert right["tokens"] > 100
    assert right["compression"] < 1
    nothing = scripted(monkeypatch, spec, lambda at, prompt: edit(0, at, names[at % 6]).svg)
    assert nothing["one_minus_mse"] == pytest.approx(nothing["do_nothing"])
    assert nothing["unchanged"] == 1.0
    broken = scripted(monkeypatch, spec, lambda at, prompt: "I cannot.")
    assert (broken["one_minus_mse"], broken["mse"], broken["validity"]) == (0.0, 1.0, 0.0)
    assert all(f"one_minus_mse,{name}" in right for name in names)


def test_a_constant_answerer_is_consistent_and_at_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(monkeypatch, Svg(task="understand", count=100), lambda at, prompt: "B")
    assert found["consistency"] == 1.0
    assert found["letter_acc"] == pytest.approx(0.25, abs=0.13)


def test_svg_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(monkeypatch, Svg(task="generate", count=10), lambda at, prompt: '<svg><path d="M0 0L9 9"/></svg>')
    assert (found["validity"], found["rules"], found["elements"], found["commands"]) == (1.0, 0.0, 1.0, 2.0)
    assert found["tokens"] == len('<svg><path d="M0 0L9 9"/></svg>')


def test_every_evaluator_has_its_function(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text to measure " * 9)
    found = measure(subject(folder), "bits_per_byte", Bytes(file=str(text)), "t", {})
    assert found.metrics["bits_per_byte"] > 0
    from weightsmith.study.evaluators.measure import _built_in

    for kind in EVALUATORS.keys() - {"lm_eval", "mteb", "program"}:
        assert callable(_built_in(kind))
    with pytest.raises(RecipeError, match="no environment of lm_eval is named"):
        measure(subject(folder), "lm_eval", None, "t", {})


def test_a_function_of_the_users_shows_no_progress_bars_of_transformers(tmp_path: Path) -> None:
    """Also of a transformers that it imports itself; afterwards they are as they were."""
    (tmp_path / "mine.py").write_text(
        "def scores(model, split):\n"
        "    from huggingface_hub.utils.tqdm import are_progress_bars_disabled\n"
        "    from transformers.utils import logging\n"
        "    return {'hidden': float(are_progress_bars_disabled() and not logging.is_progress_bar_enabled())}\n"
    )
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    assert function(tmp_path / "mine.py", {})(tmp_path, "test") == {"hidden": 1.0}
    assert logging.is_progress_bar_enabled() == shown
