"""A recipe with many mistakes, of every kind: one round says them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main

WRONG = """\
base: base
models:
  names: names
  code: {model: cdoe, weight: "0.5"}
method: [{dare: {densty: 0.5}}, {ties: {density: 1.5, scope: tensors}}]
exclude: ["embedings*"]
rules:
  - {match: "*.quary.*", parameters: {density: 0.5}}
  - {role: mpl, method: average}
  - {match: "*.key.*", method: average}
output: {dtype: bf16x}
sede: 3
"""
SAID = [
    "4:23: ties: weight = '0.5' is a text; write 0.5 without quotes",
    "5:18: unknown key 'densty' in method[0].dare; did you mean 'density'?",
    "5:41: ties: density = 1.5 is outside (0, 1]; write 1.5% as 0.015",
    "5:55: ties: scope = 'tensors' is outside global | tensor; did you mean 'tensor'?",
    "9:6: rules[1].role: unknown role 'mpl'; known: ",
    "11:10: output.dtype: unknown dtype 'bf16x'; did you mean 'bfloat16'?",
    "12:1: unknown key 'sede' in the recipe; did you mean 'seed'?",
    "code: cdoe: no such file or folder; did you mean 'code'?",
    "exclude: no tensor (of the models that are there, without code) matches 'embedings*'; did you mean 'embeddings'?",
    "rules[0]: no tensor (of the models that are there, without code) matches '*.quary.*'; did you mean 'query'?",
]


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ("embeddings.weight", "layers.0.query.weight", "layers.0.key.weight")
    for model in ("base", "names", "code"):
        (tmp_path / model).mkdir()
        save_file({name: torch.ones(2, 2) for name in names}, tmp_path / model / "model.safetensors")
    (tmp_path / "wrong.yaml").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize("command", [["plan", "wrong.yaml"], ["merge", "wrong.yaml", "out", "--set", "seed=1,2"]])
def test_every_mistake_in_one_round(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    head, *lines = capsys.readouterr().err.rstrip().splitlines()
    assert head == f"error: {len(SAID)} problems:"
    for line, said in zip(lines, SAID, strict=True):
        assert line.removeprefix("  - ").removeprefix("wrong.yaml:").startswith(said)


def test_models_that_cannot_be_told_hide_nothing(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kitchen / "wrong.yaml").write_text("base: base\nmodels: 3\nmethod: average\nsede: 3\n")
    assert main(["plan", "wrong.yaml"]) == 2
    shown = capsys.readouterr().err
    assert "2 problems" in shown
    assert "unknown key 'sede'" in shown


MODELS = "base: base\nmodels: {names: nmes, code: code}\n"
RECIPE = """\
recipe:
  base: base
  models: {names: nmes, code: code}
  method: task_arithmetc
  parameters: {weight: heavy}
"""
SEARCH = f"""\
{RECIPE}space:
  weight: {{low: 1.0, high: 0.5, per: modl}}
  lamda: [0, 1]
score: {{command: "python score.py", dta: {{search: dev.txt, report: test.txt}}}}
goals: {{near: maxx}}
sampler: cmeas
evaluations: 0
rescor: 2
"""
TUNE = f"""\
{RECIPE}preset: {{adamerging: {{step: 1, steps: few}}}}
objective: entrpy
free: {{lamda: {{start: x}}}}
data: {{names: nofile.txt}}
descent: {{lr: fast, stepss: 3}}
batch: 0
evry: 3
"""
STUDY = f"""\
titel: x
{MODELS}joint: nothere
guards: [names]
evaluate: {{bits_per_byte: {{names: {{validaton: x, test: nofile}}}}}}
methods:
  TIES: {{tise: {{density: [2, 0.5]}}}}
  X: 3
"""
SUITE = f"""\
suite: mergebench
{MODELS}tasks:
  gsm8k_cot: {{generte: {{file: gsm8k.jsonl, rule: gsm8k}}}}
  mine: {{domain: mth, role: test, chanse: 1, choices: nofile.jsonl}}
template: plane
batch: 0
methods: {{T: {{tise: {{density: 3}}}}}}
tun: grid
"""
OF_THE_RECIPE = [
    "3:12: names: nmes: no such file or folder; did you mean 'names'?",
    "4:3: unknown method 'task_arithmetc'; did you mean 'task_arithmetic'?",
    "5:16: task_arithmetic: weight = 'heavy' is no number; it takes (-inf, inf)",
]


@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("search x.yaml out", SEARCH, [
            *OF_THE_RECIPE,
            "7:3: space.weight: low 1 should be below high 0.5, both finite",
            "7:33: space.weight.per: unknown word 'modl'; did you mean 'model'?",
            "8:3: space: no stage of task_arithmetic has a parameter 'lamda'; did you mean 'lambda'?",
            "9:37: unknown key 'dta' in score; did you mean 'data'?",
            "10:9: goals.near should be 'max' or 'min', is \"maxx\"; did you mean 'max'?",
            "11:1: sampler: unknown sampler 'cmeas'; did you mean 'cmaes'?; known are random, ",
            "12:1: evaluations should be greater than or equal to 1, is 0",
            "13:1: unknown key 'rescor' in the search; did you mean 'rescore'?",
        ]),
        ("tune x.yaml out", TUNE, [
            *OF_THE_RECIPE,
            "6:1: preset adamerging: unknown option 'step'; did you mean 'steps'?",
            "6:1: preset adamerging: steps should be a whole number, is 'few'",
            "7:1: unknown objective 'entrpy'; did you mean 'entropy'?",
            "8:1: free: stands beside a preset, which has its own; keep one of them",
            "8:8: free: no stage of task_arithmetic has a parameter 'lamda'; did you mean 'lambda'?",
            '8:16: free.lamda.start should be a number, is "x"',
            "9:8: no file or folder 'nofile.txt'",
            "10:11: descent.lr should be a number, is \"fast\"",
            "10:21: unknown key 'stepss' in descent; did you mean 'steps'?",
            "11:1: batch should be greater than or equal to 1, is 0",
            "12:1: unknown key 'evry' in the tuning; did you mean 'every'?",
        ]),
        ("bench x.yaml", STUDY, [
            "1:1: unknown key 'titel' in the study; did you mean 'title'?",
            "3:10: names: nmes: no such file or folder; did you mean 'names'?",
            "4:1: joint: no file or folder 'nothere' beside the study",
            "5:1: 'names' is a task and a guard; a guard is what no expert was trained for",
            "6:12: evaluate.bits_per_byte needs code: {validation: FILE, test: FILE}",
            "6:36: unknown key 'validaton' in evaluate.bits_per_byte.names; did you mean 'validation'?",
            "6:50: evaluate.bits_per_byte.names.test: no file nofile",
            "8:3: TIES: ties: density = 2 is outside (0, 1]",
            "8:3: TIES: unknown method 'tise'; did you mean 'ties'? (in method[0])",
            "9:3: methods.X: a stage is a name, or a name with its parameters, as {ties: {density: [0.2, 0.5]}}; is 3",
        ]),
        ("bench x.yaml", SUITE, [
            "3:10: names: nmes: no such file or folder; did you mean 'names'?",
            "5:3: tasks.gsm8k_cot: needs one evaluator of ",
            "6:10: tasks.mine: unknown domain 'mth'; did you mean 'math'?; mergebench has ",
            "6:35: unknown key 'chanse' in tasks.mine; did you mean 'chance'?",
            "6:46: tasks.mine.choices: no file nofile.jsonl",
            "7:1: template should be plain, chat or a text with {prompt}, is 'plane'",
            "8:1: batch should be greater than or equal to 1, is 0",
            "9:11: T: ties: density = 3 is outside (0, 1]",
            "9:11: T: unknown method 'tise'; did you mean 'ties'? (in method[0])",
            "10:1: unknown key 'tun' in the run; did you mean 'tune'?",
        ]),
    ],
    ids=["search", "tune", "study", "suite"],
)  # fmt: skip
def test_every_mistake_of_the_other_files(
    command: str, text: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("x.yaml").write_text(text)
    assert main(command.split()) == 2
    head, *lines = capsys.readouterr().err.rstrip().splitlines()
    assert head == f"error: {len(said)} problems:"
    for line, one in zip(lines, said, strict=True):
        assert line.removeprefix("  - x.yaml:").startswith(one)
