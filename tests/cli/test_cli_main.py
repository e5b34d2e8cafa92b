"""The command line as a whole: help at once, errors in one line, exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

import weightsmith
from weightsmith.cli import main as cli
from weightsmith.cli.main import build, main
from weightsmith.core.errors import PlanError

VERBS = tuple(cli._VERBS)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "weightsmith", *words], capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    heavy = ("torch", "numpy", "pydantic", "ruamel", "cyclopts", "rich", "safetensors", "numba")
    code = (
        "import sys; from weightsmith.cli.main import main; assert main(['--help']) == 0; "
        f"print('heavy:', *(m for m in {heavy!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nheavy:\n")
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout
    took = math.inf
    for _ in range(12):  # on a busy machine most tries take longer than the program does
        began = time.perf_counter()
        assert run("--help").returncode == 0
        took = min(took, time.perf_counter() - began)
        if took < 0.3:
            break
    assert took < 0.3


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"merge", "plan", "compress", "schema"} <= set(VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr()
        assert f"Usage: weightsmith {verb}" in shown.out
        assert shown.err == ""


def test_a_verb_needs_neither_torch_nor_numpy_to_say_what_it_takes() -> None:
    code = (
        "import sys; from weightsmith.cli.main import main\n"
        f"for verb in {VERBS!r}: main([verb, '--help'])\n"
        "print('heavy:', *(m for m in ('torch', 'numpy', 'pydantic', 'numba') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nheavy:\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{weightsmith.__version__}\n"
    assert run("--version").stdout == f"{weightsmith.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merg"], 'unknown command "merg". Did you mean "merge"?; see "weightsmith --help"'),
        (["frobnicate"], 'unknown command "frobnicate"; see "weightsmith --help"'),
        (["merge", "r.yaml"], 'command "merge" parameter OUT requires an argument; see "weightsmith merge --help"'),
        (["merge", "a", "b", "--thread", "3"], "unknown option: --thread; did you mean '--threads'?"),
        (
            ["lora", "extract", "a", "--base", "b", "--out", "c"],
            "unknown option: --out; OUT is given without a name; usage: weightsmith lora extract [OPTIONS] MODEL OUT; "
            'see "weightsmith lora extract --help"',
        ),
        (["merge", "a", "b", "c"], "unexpected argument 'c'; usage: weightsmith merge [OPTIONS] RECIPE OUT; see"),
        (["lora", "merge", "a", "b", "c"], "unexpected argument 'c'; usage: weightsmith lora merge"),
        (["merge", "a", "b", "--threads", "many"], 'invalid value for --threads: unable to convert "many" into int'),
        (["merge", "a", "b", "--no-json"], "unknown option: --no-json"),
        (
            ["observe", "m", "--stat", "gram", "-o", "x"],
            "nothing to observe; give --data FILE (or --optimizer",
        ),
    ],
)
def test_usage_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1


def test_a_known_error_is_one_line_and_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "no.yaml")
    assert main(["merge", missing, "out"]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {missing}: no such recipe file\n"
    for words in (["--debug", "merge", missing, "out"], ["merge", missing, "--debug", "out"]):
        assert main(words) == 2
        shown = capsys.readouterr()
        assert "Traceback" in shown.err
        assert shown.err.endswith(f"error: {missing}: no such recipe file\n")


def failing(error: BaseException) -> object:
    def run(*args: object, **more: object) -> object:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; continue with --resume\n"),
        (KeyError(3), 1, "internal error: KeyError: 3; please report it; --debug shows where\n"),
        (PlanError(["one", "two"]), 2, "error: 2 problems:\n  - one\n  - two\n"),
        (PlanError(["bad \x1b[31mname"]), 2, "error: bad \\x1b[31mname\n"),
    ],
)  # fmt: skip
def test_what_becomes_of_errors(
    error: BaseException, code: int, message: str, recipe: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("weightsmith.jobs.merge.run", failing(error))
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", message)


def test_an_interrupted_verb_that_cannot_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weightsmith.io.package.manifest.verify_folder", failing(KeyboardInterrupt()))
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_stops_early() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "weightsmith", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # long before anything is printed
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "completion"
    assert main(["--install-completion", "--shell", "bash", "--output", str(script)]) == 0
    assert str(script) in capsys.readouterr().out
    text = script.read_text()
    assert all(verb in text for verb in VERBS)
    assert "--dry-run" in text


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import weightsmith; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"weightsmith"}


def test_the_public_names() -> None:
    assert weightsmith.__all__ == sorted(weightsmith.__all__)
    for name in weightsmith.__all__:
        assert getattr(weightsmith, name).__name__.rpartition(".")[2] == name
    names = dir(weightsmith)
    assert {"Ties", "Dare", "TaskArithmetic", "merge", "Recipe"} <= set(names)
    for name in names:
        getattr(weightsmith, name)
    assert weightsmith.Ties(density=0.5).name == "ties"
    with pytest.raises(AttributeError, match="no attribute 'Tiess'; did you mean 'Ties'"):
        _ = weightsmith.Tiess
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = weightsmith.nothing


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert weightsmith.__version__ == version("weightsmith")


def test_every_verb_is_a_file_of_its_own() -> None:
    app = build()
    for verb in VERBS:
        inner = [app[verb][word] for word in app[verb] if not word.startswith("-")]
        homes = {f"weightsmith.cli.{verb}", *(f"weightsmith.cli.{verb}.{word.name[0]}" for word in inner)}
        found = [one.default_command for one in (app[verb], *inner) if one.default_command is not None]
        assert found
        assert {command.__module__ for command in found} <= homes


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "weightsmith recipe"
    assert main(["schema", "tune"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "weightsmith tuning"
    assert main(["schema", "tunes"]) == 2
    assert "tunes" in capsys.readouterr().err
