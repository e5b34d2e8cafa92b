"""Designs with subsets: the scale study's findings and merging in the wild, on points with closed forms."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from harness_toy import language_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from suite_toy import PROGRAM, TASKS, calls, make

from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError
from weightsmith.study import suite_lab
from weightsmith.study.cells_show import csv_text, document, markdown_page
from weightsmith.study.evaluators.found import Found
from weightsmith.study.evaluators.subject import Subject
from weightsmith.study.findings import Finding, findings, shares, sign_test
from weightsmith.study.suite_bench import bench_suite
from weightsmith.study.suite_cells import Cell, CellsResult, drawn

LINEAR = PROGRAM.replace("0.5 + 0.4 * min(reach, 2 - reach)", "reach")
"""A task's score is the share of the way to its expert: 0 at the base, 1 there."""

MODELS = "base: base.safetensors, models: {red: red.safetensors, green: green.safetensors, blue: blue.safetensors}"

SCALE = f"""
suite: scale
bases:
  small: {{size: 1, kind: weak, joint: joint.safetensors, {MODELS}}}
  large: {{size: 2, kind: strong, {MODELS}}}
tasks:
  red: {{domain: red, program: {{command: PROGRAM}}}}
  green: {{domain: green, program: {{command: PROGRAM}}}}
  blue: {{domain: blue, program: {{command: PROGRAM}}}}
  grey: {{domain: outside, role: held-out, program: {{command: PROGRAM}}}}
methods:
  average: linear
  task arithmetic: {{task_arithmetic: {{lambda: 1.0}}}}
counts: [1, 2, 3]
subsets: 2
"""
WILD = f"suite: in_the_wild\n{SCALE[SCALE.index('tasks:') :]}" + "\n".join(MODELS.split(", ", 1)) + "\n"


def measured(folder: Path, text: str = SCALE) -> CellsResult:
    run = make(folder, text)
    (folder / "score.py").write_text(LINEAR)
    found = bench_suite(run, folder / "out")
    assert isinstance(found, CellsResult)
    return found


def test_disjoint_experts_in_closed_form(tmp_path: Path) -> None:
    result = measured(tmp_path)
    assert len(result.cells) == 2 * 2 * (2 + 2 + 1)
    for cell in result.cells:
        wanted = 1.0 if cell.method == "task arithmetic" else 1 / cell.count
        assert cell.held_in == pytest.approx(wanted, abs=0.01)
        away = cell.count if cell.method == "task arithmetic" else 1
        assert cell.held_out == pytest.approx((0.8 - 0.1 * away) / 0.8)
        assert not cell.marked
    once = {cell.held_in for cell in result.cells if cell.count == 1}
    assert once == {1.0}, "an average of one is the expert"


def test_the_same_subsets_everywhere_and_every_model_scored_once(tmp_path: Path) -> None:
    result = measured(tmp_path)
    seen = {(cell.rung, cell.method): [] for cell in result.cells}  # type: ignore[var-annotated]
    for cell in result.cells:
        seen[cell.rung, cell.method].append(cell.subset)
    assert len({tuple(found) for found in seen.values()}) == 1
    # both bases are the same bytes here: base, 3 experts, joint and 5 subsets; of one expert both methods are asked
    assert set(Counter(calls(tmp_path)).values()) == {1 + 3 + 1 + 2 * 5}
    before = len(calls(tmp_path))
    assert bench_suite(tmp_path / "run.yaml", tmp_path / "out") == result
    assert len(calls(tmp_path)) == before


def test_deleted_records_only_are_measured_again(tmp_path: Path) -> None:
    result = measured(tmp_path)
    ledger = tmp_path / "out" / "scores.jsonl"
    lines = ledger.read_text().splitlines()
    kept = [line for at, line in enumerate(lines) if at % 2]
    gone = sum("found" in json.loads(line)["value"] for at, line in enumerate(lines) if not at % 2)
    ledger.write_text("\n".join(kept) + "\n")
    before = len(calls(tmp_path))
    assert bench_suite(tmp_path / "run.yaml", tmp_path / "out") == result
    assert len(calls(tmp_path)) - before == gone


@pytest.mark.parametrize(("program", "share"), [(PROGRAM, 1), (LINEAR, 0)])
def test_identity(tmp_path: Path, program: str, share: float) -> None:
    """All experts are the base: every share is 1, or a difference of 0 where the base scores nothing."""
    run = make(tmp_path, SCALE)
    (tmp_path / "score.py").write_text(program)
    for name in TASKS:
        (tmp_path / f"{name}.safetensors").write_bytes((tmp_path / "base.safetensors").read_bytes())
    result = bench_suite(run, tmp_path / "out")
    for cell in result.cells:
        assert cell.held_in == share, "where the base scores 0 the difference is given"
        assert set(cell.marked) == (set() if share else set(cell.subset))
        assert cell.held_out == pytest.approx(1)
    assert "spreads 1: 0.000, 2: 0.000" in result.findings[4].statistic


def test_subsets_are_drawn_from_the_seed() -> None:
    names = [f"e{n}" for n in range(8)]
    for count in (2, 4, 6):
        found = drawn(names, count, 3, seed=5)
        assert found == drawn(names, count, 3, seed=5)
        assert len(set(found)) == 3
        assert all(len(set(one)) == count and list(one) == sorted(one) for one in found)
    assert drawn(names, 4, 3, seed=5) != drawn(names, 4, 3, seed=6)
    assert drawn(names, 8, 3, seed=5) == (tuple(names),)
    assert len(drawn(names[:3], 2, 5, seed=0)) == 3, "all of them where there are fewer"


def test_in_the_wild(tmp_path: Path) -> None:
    result = measured(tmp_path, WILD)
    told = {(one.name, one.says): one for one in result.findings}
    assert told["task arithmetic", "above the base"].statistic.startswith("5 of 5 merges, 100% [57%, 100%]")
    assert told["task arithmetic", "above the base"].verdict == "mostly"
    # of several experts the sum is above each of them, of one it is that one
    assert told["task arithmetic", "above the best checkpoint"].statistic.startswith("3 of 5 merges")


def test_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(tmp_path)
    assert main(["bench", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for number in range(1, 6):
        assert f"- {number}. " in shown
    assert document(result).count("<figcaption>") >= 5 + 3
    assert len(csv_text(result).splitlines()) == 1 + len(result.cells)
    page = markdown_page(result)
    assert "Kendall" in page
    assert "| method | task arithmetic | 10 | 1.000 |" in page, "what a factor does, over all others"
    assert "| small | red | 1.000 |" in page, "the experts' rows"
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(held["result"]["cells"]) == len(result.cells)


FAULTS = [
    ("counts: [1, 2, 3]", "counts: [4]", "3 experts are fewer than the smallest count, 4"),
    ("blue: blue.safetensors}}\n  large", "blu: blue.safetensors}}\n  large", "have different experts (blu, blue)"),
    ("red: {domain: red,", "red: {domain: rot,", "domain 'rot' is no expert"),
    ("kind: weak", "kind: week", "did you mean 'weak'?"),
    ("size: 1", "size: -1", "greater than or equal to 0"),
    ("lambda: 1.0", "lambda: [0.5, 1.0]", "a design with subsets takes one setting each"),
    (f"{MODELS}}}\n  large", "models: {red: red.safetensors}}\n  large", "a suite needs a base"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), FAULTS, ids=[said[:25] for *_, said in FAULTS])
def test_what_does_not_go_together(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SCALE
    with pytest.raises(RecipeError) as error:
        measured(tmp_path, SCALE.replace(old, new, 1))
    assert said in str(error.value)
    assert not calls(tmp_path)


TUNED = SCALE.replace(
    "  grey:",
    "  red_loss: {domain: red, role: proxy, direction: lower, program: {command: PROGRAM}}\n"
    "  green_loss: {domain: green, role: proxy, direction: lower, program: {command: PROGRAM}}\n  grey:",
)


def test_every_cells_coefficients_are_chosen_on_its_proxies(tmp_path: Path) -> None:
    text = TUNED.replace("subsets: 2", "subsets: 2\ntune: grid").replace("lambda: 1.0", "lambda: [0.25, 1.0, 0.5]")
    result = measured(tmp_path, text.replace("[1, 2, 3]", "[1, 2]"))
    assert "chosen on the proxies of the experts that it merges" in result.warnings[0]
    for cell in result.cells:
        if cell.method == "task arithmetic":
            # blue has no proxy: a cell of it alone keeps the first setting
            assert cell.chosen == ("lambda 0.25" if cell.subset == ("blue",) else "lambda 1")
    # 3 experts, and 3 candidates of every subset with red in it; both bases are the same bytes
    with_red = {cell.subset for cell in result.cells if "red" in cell.subset}
    assert calls(tmp_path).count("red_loss") == len({n for s in with_red for n in s}) + 3 * len(with_red)
    for broken, said in ((text.replace("\ntune: grid", ""), "tasks.red_loss has role: proxy; say tune: grid"),
                         (SCALE + "tune: grid\n", "there is no task of role: proxy to choose on")):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            measured(tmp_path / said[:4], broken)


def test_a_wider_model_keeps_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy ladder: random features of width 8 and 256, experts that each learn one task exactly from the base."""
    for seed in range(3):
        draw = np.random.default_rng(seed)
        text = (
            SCALE.replace("size: 1", "size: 8")
            .replace("size: 2", "size: 256")
            .replace("counts: [1, 2, 3]", "counts: [3]")
        )
        run = make(tmp_path / str(seed), text.replace("joint: joint.safetensors, ", "").replace("  grey", "  # grey"))
        inputs, answers, features = {}, {}, {}
        for width, rung in ((8, "small"), (256, "large")):
            base = draw.normal(size=width) / width**0.5
            (run.parent / rung).mkdir()
            save_file({"w": base.astype(np.float32)}, run.parent / rung / "base.safetensors")
            for name in TASKS:
                inputs[name] = inputs.get(name, draw.normal(size=(2, 16)))
                answers[name] = answers.get(name, draw.normal(size=2))
                features[width, name] = np.tanh(inputs[name] @ draw.normal(size=(16, width)))
                held = features[width, name]
                learnt = base + np.linalg.pinv(held) @ (answers[name] - held @ base)
                save_file({"w": learnt.astype(np.float32)}, run.parent / rung / f"{name}.safetensors")
        lines = run.read_text().splitlines()
        run.write_text(
            "\n".join(
                re.sub(r"(\w+\.safetensors)", rf"{line.split(':')[0].strip()}/\1", line) if "size:" in line else line
                for line in lines
            )
            + "\n"
        )

        def found(subject: Subject, kind: str, spec: object, task: str, environments: object) -> Found:
            file = subject.folder if subject.folder.is_file() else subject.folder / "model.safetensors"
            w = load_file(file)["w"]
            error = np.mean((features[len(w), task] @ w - answers[task]) ** 2)  # noqa: B023
            return Found({"score": float(1 / (1 + error))})

        monkeypatch.setattr(suite_lab, "measure", found)
        result = bench_suite(run, run.parent / "out")
        mean = {size: np.mean([c.held_in for c in result.cells if c.size == size and c.method == "task arithmetic"])
                for size in (8, 256)}  # fmt: skip
        assert len(result.cells) == 2 * 2
        assert mean[256] > mean[8], (seed, mean)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    """Adapters beside full models, and scores by token over different tokenizers."""
    base = tmp_path / "models" / "base"
    language_model(base)
    torch.manual_seed(0)
    full, lora = tmp_path / "models" / "red", tmp_path / "models" / "green"
    shutil.copytree(base, full)
    key = "model.layers.0.self_attn.q_proj"
    lora.mkdir()
    save_tensors({f"base_model.model.{key}.lora_{n}.weight": torch.randn(shape) * 0.1
                  for n, shape in (("A", (2, 32)), ("B", (32, 2)))}, lora / "adapter_model.safetensors")  # fmt: skip
    (lora / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 2,
                "target_modules": ["q_proj"],
                "base_model_name_or_path": str(base),
            }
        )
    )
    other = tmp_path / "models" / "other"
    shutil.copytree(base, other)
    words = other / "tokenizer.json"
    words.write_text(words.read_text() + "\n")
    (tmp_path / "t.jsonl").write_text('{"text": "hello"}\n')
    models = "models: {red: models/red, green: models/green}"
    run = tmp_path / "run.yaml"
    run.write_text(
        f"suite: scale\nbases:\n  one: {{size: 1, base: models/base, {models}}}\n"
        f"  two: {{size: 2, base: models/other, {models}}}\ncounts: [2]\nmethods: {{average: linear}}\ntasks:\n"
        "  red: {domain: red, likelihood: {file: t.jsonl}, metric: token_accuracy}\n"
        "  green: {domain: green, likelihood: {file: t.jsonl}, metric: bits_per_byte}\n"
    )
    said = bench_suite(run, tmp_path / "out").warnings
    assert "one: green are adapters and the others full models, which merge differently" in said
    assert "red: counted by token, but the bases have different tokenizers; take bits_per_byte" in said


def test_several_bases_are_for_the_scale_study(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="takes one base"):
        measured(tmp_path, SCALE.replace("suite: scale", "suite: svg").replace("counts: [1, 2, 3]\nsubsets: 2\n", ""))


# --- statistics --------------------------------------------------------------------------------------


def test_the_sign_test() -> None:
    assert sign_test([1.0] * 6) == (6, 0, pytest.approx(2 / 64))
    assert sign_test([1.0, -1.0, 0.0]) == (1, 1, 1.0)
    assert sign_test([0.0]) == (0, 0, None)


def cell(size: float, base: str, method: str, count: int, subset: int, held_in: float, held_out: float = 1.1) -> Cell:
    names = tuple(f"e{n}" for n in range(subset, subset + count))
    return Cell(
        f"{base}{size}", size, base, method, count, names, {}, held_in, held_in, held_out, held_in > 0.5, held_in > 0.9
    )


def test_planted_findings_are_seen_and_their_reverse_is_told() -> None:
    """Held-in falls with count, less for large sizes and strong bases; methods differ at the small size only."""

    def planted(sign: float) -> list[Finding]:
        cells = [
            cell(size, base, method, count, subset,
                 0.9 - sign * 0.05 * count / size + sign * (0.05 if base == "strong" else 0) + sign * 0.02 * size
                 + at * (0.02 / size if sign > 0 else 0.02 * size) + 0.001 * subset, 1 + 0.1 * sign)
            for size in (1.0, 2.0)
            for base in ("weak", "strong")
            for at, method in enumerate(("average", "ties", "sum"))
            for count in (2, 4)
            for subset in range(3)
        ]  # fmt: skip
        return findings(cells, {}, [])

    assert [one.verdict for one in planted(1)] == ["seen"] * 5
    assert [one.verdict for one in planted(-1)] == ["reversed"] * 5
    for one in planted(1):
        assert one.points
        assert one.statistic


def test_findings_without_pairs_are_not_measured() -> None:
    found = findings([cell(1, "", "average", 2, 0, 0.8)], {}, [])
    assert [one.verdict for one in found[:2]] == ["not measured"] * 2
    assert found[4].verdict == "not measured"


def test_shares_by_hand() -> None:
    found = shares([cell(1, "", "sum", 2, at, value) for at, value in enumerate((0.4, 0.6, 0.95, 0.99))])
    assert [one.statistic.split(",")[0] for one in found] == ["3 of 4 merges", "2 of 4 merges"]
    assert {one.verdict for one in found} == {"not told apart"}
