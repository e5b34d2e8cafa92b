"""What each verb prints, passes on and returns."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.numpy import load_file

from weightsmith.cli import show
from weightsmith.cli.main import main
from weightsmith.core.method import registered
from weightsmith.inspect.catalogue import LEARNED, PURPOSES, describe
from weightsmith.jobs.job import Result
from weightsmith.tune.registry import named
from weightsmith.tune.setting import Preset

Captured = pytest.CaptureFixture[str]


class Recorder:
    """Stands for an engine function: keeps how it was called, returns what it was given."""

    def __init__(self, result: Any = None) -> None:
        self.result = result
        self.args: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.args, self.named = args, named
        return self.result


# --- merge ---------------------------------------------------------------------------------------


def test_merge_verify_and_tamper(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(recipe), str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"wrote {out}: ")
    assert "in 1 file" in shown.out
    assert f'next: "weightsmith check {out}"' in shown.out
    for tensor in load_file(out / "model.safetensors").values():
        assert (tensor == 2.0).all()
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: as it was written\n"
    assert main(["merge", str(recipe), str(out), "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"{out} is already complete: ")
    assert main(["merge", str(recipe), str(tmp_path / "anew"), "--resume"]) == 0
    assert "/s in and out" not in capsys.readouterr().out, "of what an earlier run may have done"
    assert main(["merge", str(recipe), str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (
        main(["merge", str(recipe), str(out), "--overwrite", "--set", "parameters.weight={a: 3, b: 1}", "--json"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == str(out)
    assert facts["files"] == 1
    for tensor in load_file(out / "model.safetensors").values():
        assert (tensor == 1.5).all()
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["verify", str(out), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert len(found["problems"]) == 1


def test_merge_passes_its_options_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    out = tmp_path / "out"
    engine = Recorder(Result(out, 2.0, 6_000_000_000, 2_000_000_000, 10**9, ("look at this",)))
    monkeypatch.setattr("weightsmith.jobs.merge.run", engine)
    words = ["--memory", "4GB", "--threads", "3", "--device", "cuda:1", "--resume", "--overwrite", "--set", "seed=5"]
    assert main(["merge", str(recipe), str(out), *words]) == 0
    made, target, settings = engine.args
    assert made.seed == 5
    assert target == out
    assert asdict(settings) == {
        "memory": 4_000_000_000, "threads": 3, "device": "cuda:1", "resume": True, "overwrite": True, "progress": None,
        "files": (recipe,), "fingerprint": "quick", "ray": None,
    }  # fmt: skip
    shown = capsys.readouterr()
    assert shown.err == "warning: look at this\n"
    assert "2.0 s, 4 GB/s in and out" in shown.out
    assert main(["merge", str(recipe), str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "4XB"], "error: --memory: '4XB' is not a size; write it like 500MB, 5GB or 2GiB\n"),
        (["--memory", "0"], "error: --memory must be at least 1 byte, for example 4GB (got 0)\n"),
        (["--threads", "0"], "error: --threads 0 is outside [1, inf)\n"),
        (["--device", "gpu"], "error: --device: unknown device 'gpu'"),
        (["--set", "sed=1"], "error: --set sed=1: unknown key 'sed' in the recipe; did you mean 'seed'?\n"),
    ],
)
def test_merge_refuses(words: list[str], message: str, recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["merge", str(recipe), str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(recipe), str(out), "--dry-run"]) == 0
    assert "What happens to the tensors" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "recipe.yaml"]
    out.mkdir()
    (out / "mine").touch()
    assert main(["merge", str(recipe), str(out), "--dry-run"]) == 2
    assert "exists and is not empty" in capsys.readouterr().out
    assert main(["merge", str(recipe), str(out), "--dry-run", "--overwrite"]) == 0
    assert (out / "mine").exists()


# --- plan ----------------------------------------------------------------------------------------


def test_plan_says_what_will_happen(recipe: Path, capsys: Captured) -> None:
    assert main(["plan", str(recipe), "--set", "exclude=*norm*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines]
    assert ["name", "role", "from", "tensors", "size", "dtype", "to", "download"] in table
    assert any(row[:2] == ["base", "base"] and row[-5:] == ["2", "144", "B", "float32", "-"] for row in table)
    assert sum(row[1:2] == ["expert"] for row in table) == 2
    assert any("linear" in line and line.split()[-2:] == ["1", "32"] for line in lines)
    assert any("keep" in line or "copied" in line for line in lines)
    assert any(line.startswith("writes:   144 B, 2 tensors, 36 parameters, float32") for line in lines)
    assert any(line.startswith("memory:") for line in lines)
    assert any(
        line.startswith("time:     about 1 s on one core of a server (AMD EPYC; rough, without downloads)")
        for line in lines
    )
    assert any(line.startswith("disk:") for line in lines)
    assert "\x1b" not in "".join(lines), "plain where nobody looks"


def test_plan_for_programs(recipe: Path, capsys: Captured) -> None:
    assert main(["plan", str(recipe), "--json", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [i["name"] for i in facts["inputs"]] == ["base", "a", "b"]
    assert facts["write_bytes"] == 144
    assert facts["threads"] == 1
    assert facts["seconds"] == pytest.approx(1, abs=0.01)
    assert facts["problems"] == []
    assert facts["output"]["dtypes"] == ["float32"]


def test_plan_shows_every_problem(recipe: Path, capsys: Captured) -> None:
    (recipe.parent / "a/model.safetensors").write_bytes(b"short")
    recipe.write_text("models: {a: a, b: b, c: gone/gone/gone}\nmethod: ties\n")
    assert main(["plan", str(recipe)]) == 2
    shown = capsys.readouterr().out
    assert "problems:\n" in shown
    assert "  - a: " in shown
    assert "  - c: " in shown
    assert main(["plan", str(recipe), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) >= 2


def test_plan_reports_the_recipes_mistakes_together(recipe: Path, capsys: Captured) -> None:
    recipe.write_text("models: {a: a, b: b}\nmethod: liner\nsed: 1\n")
    assert main(["plan", str(recipe)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"error: 2 problems:\n  - {recipe}:2:1: unknown method 'liner'; did you mean 'linear'?\n"
        f"  - {recipe}:3:1: unknown key 'sed' in the recipe; did you mean 'seed'?\n"
    )


# --- methods -------------------------------------------------------------------------------------


def test_methods_lists_them_all(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name in (*registered(), *named(Preset)):
        assert f"\n  {name} " in shown
    assert main(["methods", "--json"]) == 0
    found = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    assert found.keys() == registered().keys() | named(Preset).keys()
    assert found["atlas"] == {
        "name": "atlas", "kind": "preset", "purpose": LEARNED, "summary": named(Preset)["atlas"].help()
    }  # fmt: skip
    assert found["ties"]["kind"] == "method"
    assert found["dare"]["kind"] == "filter"
    assert found["tall_masks"]["kind"] == "codec"
    assert found["dare"]["purpose"].startswith("Edit the changes")
    assert all(m["summary"] for m in found.values())


def test_every_method_has_a_purpose_and_one_plain_line() -> None:
    placed = [name for names in PURPOSES.values() for name in names]
    built_in = {n for n, cls in registered().items() if cls.__module__.startswith("weightsmith.")}
    assert len(placed) == len(set(placed))
    assert set(placed) <= built_in
    assert {registered()[name].purpose for name in built_in - set(placed)} <= PURPOSES.keys()
    for one in (describe(registered()[name]) for name in built_in):
        assert one["summary"].endswith("."), one["name"]
        assert len(one["summary"]) <= 95, f"{one['name']}: a line of its own is shorter"
        assert not re.search(r"[=|<>^]|sum_", one["summary"]), f"{one['name']}: a formula in its summary"


def test_methods_explains_one(capsys: Captured) -> None:
    assert main(["methods", "ties"]) == 0
    shown = capsys.readouterr().out
    assert "2306.01708" in shown
    assert "a base model" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert any(row[:4] == ["density", "0.2", "(0,", "1]"] for row in rows)
    assert any(row[:1] == ["lambda"] for row in rows)
    assert main(["methods", "average"]) == 0
    assert capsys.readouterr().out.startswith("linear (method, also called average, uniform_soup)")
    assert main(["methods", "tie"]) == 2
    assert capsys.readouterr().err == "error: unknown method 'tie'; did you mean 'ties'?\n"


def test_methods_explains_the_name_of_a_pipeline(capsys: Captured) -> None:
    assert main(["methods", "dare_ties"]) == 0
    shown = capsys.readouterr().out
    assert "method: [dare, {ties: {density: 1, scope: tensor}}]" in shown
    assert "Drop changes at random" in shown
    assert main(["methods", "dare_ties", "--json"]) == 0
    assert [stage["name"] for stage in json.loads(capsys.readouterr().out)["stages"]] == ["dare", "ties"]


def test_methods_explains_a_preset(capsys: Captured) -> None:
    assert main(["methods", "adamerging"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith('adamerging (preset of "weightsmith tune")\n\nLearn a coefficient per model and tensor')
    assert "\nlr:              0.001\n" in shown
    assert "preset: {adamerging: {OPTION: VALUE}}" in shown


# --- the thin ones -------------------------------------------------------------------------------


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    report = {
        "path": "out", "kind": "causal-lm", "ok": True, "finite": True, "ran": True, "unlike": False, "problems": [],
        "warnings": ["odd"], "notes": ["n"], "missing": {"a": "not here"},
        "models": {"merged": {"perplexity": 3.25, "bits_per_byte": 1.5, "tokens": 90}},
        "answers": {"merged": "four"}, "scores": {"merged": {"sums": 0.5}, "a": {}},
    }  # fmt: skip
    look = Recorder(report)
    monkeypatch.setattr("weightsmith.observe.check.check", look)
    text = tmp_path / "t.txt"
    assert main(["check", "out", "--text", str(text)]) == 0
    assert look.args == (Path("out"),)
    assert look.named["text"] == text
    shown = capsys.readouterr()
    assert ["merged", "3.250", "1.5000", "90"] in [line.split() for line in shown.out.splitlines()]
    assert "note: a is not compared: not here" in shown.out
    assert "merged answers: four" in shown.out
    assert ["a", "-"] in [line.split() for line in shown.out.splitlines()]
    assert shown.out.endswith("out: works\n")
    assert shown.err == "warning: odd\n"
    look.result = report | {"ok": False, "problems": ["NaN in x"], "models": {"merged": {"perplexity": float("inf")}}}
    assert main(["check", "out", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["models"]["merged"]["perplexity"] is None
    for words in (["--chat"], ["--tokens", "0"], ["--evaluator", "none.py"]):
        assert main(["check", "out", *words]) == 2
        assert words[0] in capsys.readouterr().err


def test_observe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    collect = Recorder()
    monkeypatch.setattr("weightsmith.observe.collect.observe", collect)
    out = tmp_path / "stats"
    wanted = ["--data", "d.txt", "--stat", "gram, fisher", "-o", str(out), "--examples", "9", "--layers", "0", "2"]
    assert main(["observe", "org/m", *wanted]) == 0
    assert collect.args == ("org/m", Path("d.txt"), ["gram", "fisher"], out)
    assert (collect.named["examples"], collect.named["layers"], collect.named["progress"]) == (9, (0, 2), None)
    assert f'next: add "stats: {out}" to this model in the recipe' in capsys.readouterr().out


def test_verify_reruns(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("weightsmith.io.package.manifest.verify_folder", Recorder([]))
    monkeypatch.setattr("weightsmith.io.package.manifest.read_manifest", Recorder({"kind": "merge"}))
    engine = ModuleType("weightsmith.jobs.verify")
    engine.rerun = Recorder([])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weightsmith.jobs.verify", engine)
    assert main(["verify", "out", "--rerun"]) == 0
    assert capsys.readouterr().out == "out: as it was written, and the recipe gives the same bytes again\n"
    engine.rerun.result = ["x differs"]  # type: ignore[attr-defined]
    assert main(["verify", "out", "--rerun"]) == 2
    assert "  - x differs\n" in capsys.readouterr().out


def test_verify_goes_through_a_sweep(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    recipe.write_text("base: base\nmodels: {a: a, b: b}\nmethod: task_arithmetic\n")
    out = tmp_path / "swept"
    assert main(["merge", str(recipe), str(out), "--set", "parameters.lambda=0.2,0.4", "--quiet"]) == 0
    names = sorted(path.name for path in out.iterdir())
    capsys.readouterr()
    assert main(["verify", str(out), "--rerun"]) == 0
    same = "as it was written, and the recipe gives the same bytes again"
    assert capsys.readouterr().out.splitlines() == [f"{out / name}: {same}" for name in names]
    (out / names[1] / "README.md").unlink()
    assert main(["verify", str(out), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["variants"][names[0]]["ok"]) == (False, True)
    assert found["variants"][names[1]]["problems"] == ["README.md is missing"]
    (out / "third.partial").mkdir()
    assert main(["verify", str(out)]) == 2
    assert f"{out}: third.partial: interrupted; go on with the same command and --resume" in capsys.readouterr().err


def test_methods_of_adapters_are_pointed_to_their_command(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    recipe.write_text("models: {a: a, b: b}\nmethod: cat\n")
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 2
    assert (
        'cat combines adapters into one adapter; run it with "weightsmith lora merge", or give the adapters as '
        "models of another method"
    ) in capsys.readouterr().err


def test_presets_of_tuning_are_pointed_to_their_command(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    from weightsmith.core import elsewhere

    assert sorted(elsewhere.LEARNED) == sorted(named(Preset))
    assert main(["plan", str(recipe), "--set", "method=adamerging"]) == 2
    assert (
        'adamerging learns the numbers of a recipe from data; run it with "weightsmith tune"' in capsys.readouterr().err
    )


def test_these_are_the_methods_that_only_adapters_have() -> None:
    from weightsmith.core.elsewhere import OF_ADAPTERS
    from weightsmith.core.method import registered
    from weightsmith.lora.rules import METHODS
    from weightsmith.recipe.aliases import PIPELINES

    stages = registered()
    known = {*stages, *PIPELINES, *(alias for stage in stages.values() for alias in stage.traits.aliases)}
    assert tuple(sorted(METHODS.keys() - known)) == OF_ADAPTERS


def test_compress_and_restore(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back"
    recipe.write_text("base: base\nmodels: {a: a, b: b}\nmethod: [task_arithmetic, tall_masks]\n")
    assert main(["plan", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["compress", str(recipe), str(packed), "--accept-loss"]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {packed}: " in shown
    assert "2 models in " in shown
    assert "of the 288 B that they take in full" in shown
    assert main(["restore", str(packed), str(back), "--expert", "b", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    noted = json.loads((packed / "weightsmith.json").read_text())["codec"]["error"]
    assert (said["files"], said["lost"]) == (1, noted["b"])
    assert main(["restore", str(packed), str(tmp_path / "a2"), "--expert", "a"]) == 0
    assert f"compression lost {noted['a']:.2%} of it" in capsys.readouterr().out
    restored = load_file(back / "model.safetensors")
    assert {name: tensor.shape for name, tensor in restored.items()} == {
        name: tensor.shape for name, tensor in load_file(tmp_path / "b/model.safetensors").items()
    }
    assert main(["restore", str(packed), str(tmp_path / "x"), "--expert", "bb"]) == 2
    assert "did you mean 'b'?" in capsys.readouterr().err
    assert main(["restore", str(packed), str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == (
        "error: restore needs the name of an expert (a, b), or a number for consensus, and not both: --expert a, or "
        "--consensus 2\n"
    )


# --- printing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_920_000_000, "1.92 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert show.size(count) == text


def test_durations() -> None:
    assert [show.duration(s) for s in (0.04, 99, 120, 7200)] == ["0.0 s", "99.0 s", "2.0 min", "2.0 h"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with show.progress_bar("x", quiet=False) as progress:
        assert progress is None
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with show.progress_bar("merging", quiet=True) as progress:
        assert progress is None
    with show.progress_bar("merging", quiet=False) as progress:
        assert progress is not None
        progress(5_000_000, 10_000_000)
        progress(10_000_000, 10_000_000)
    assert "merging" in screen.getvalue()
    assert "10.0/10.0 MB" in screen.getvalue()


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    show.table("Things", ("name", "size"), [("[bold]x\x1b", 3)], right=(1,))
    assert "[bold]x\\x1b" in screen.getvalue(), "what comes from files is text, not markup or control"
