"""Methods from outside: a file on the command line, or an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors.numpy import load_file as load_tensors

from weightsmith.cli.main import main
from weightsmith.core import method as core_method
from weightsmith.core.errors import RecipeError
from weightsmith.core.method import registry as find
from weightsmith.plugins import load_file, neighbours, run_once

EXAMPLE = Path(__file__).parent / "example_plugin.py"


@pytest.mark.usefixtures("registry")
def test_a_file_adds_a_method(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="unknown method 'median'"):
        find("median")
    recipe.write_text(
        "models: {a: a, b: b, base: base}\nmethod: {median: {pull: 0.75}}\n".replace("base: base", "c: base")
    )
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--plugin", str(EXAMPLE)]) == 0
    assert find("median").__name__ == "Median"
    for tensor in load_tensors(tmp_path / "out/model.safetensors").values():
        assert tensor == pytest.approx(1 + 0.75 / 3)  # median 1, mean 4/3
    assert main(["verify", str(tmp_path / "out"), "--rerun", "--plugin", str(EXAMPLE)]) == 0
    assert "the recipe gives the same bytes again" in capsys.readouterr().out
    core_method._registered.pop("median")
    assert main(["verify", str(tmp_path / "out"), "--rerun"]) == 2
    said = capsys.readouterr().out
    assert "unknown method 'median'" in said
    assert "run again before the file that its method comes from is named (--plugin FILE): unknown method" in said
    assert main(["methods", "median", "--plugin", str(EXAMPLE)]) == 0
    assert "share of the mean that is mixed in" in capsys.readouterr().out
    assert (
        main(["merge", str(recipe), str(tmp_path / "o2"), "--plugin", str(EXAMPLE), "--set", "method.median.pull=2"])
        == 2
    )
    assert "median: pull = 2 is outside [0, 1]" in capsys.readouterr().err


BROKEN = """from weightsmith.core.method import Method
from dataclasses import dataclass

@dataclass(frozen=True)
class Broken(Method, name="broken"):
    \'\'\'Fails.\'\'\'

    def merge(self, site):
        return {}
"""


@pytest.mark.parametrize(
    ("does", "text"),
    [
        ("site.stack.mean(0) + missing", "{file}:9: NameError: name 'missing' is not defined"),
        ("site.stack @ site.stack.double()", "{file}:9: RuntimeError: Expected "),
        ("None", "broken ({plugin}) returned NoneType, not a tensor"),
        ("site.stack", "broken ({plugin}) returned shape [2, "),
        ("site.stack.mean(0) / 0", "broken ({plugin}) gives "),
        ("site.stack.mean(0) / 0", "although all inputs are finite; look for what is divided by zero there"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_what_a_plugin_does_wrong_is_said_of_it(
    does: str, text: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN.format(does))
    recipe.write_text("models: {a: a, b: b}\nmethod: broken\n")
    for named in (str(file), os.path.relpath(file)):
        assert main(["merge", str(recipe), str(tmp_path / "out"), "--plugin", named]) == 2
        said = capsys.readouterr().err
        assert text.format(file=f"error: --plugin {named}", plugin=f"--plugin {named}") in said
        core_method._registered.pop("broken")
    assert "report" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("registry")
def test_a_plugin_may_import_its_neighbours(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no compiled files beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "helper_beside_it.py").write_text("def mean(stack):\n    return stack.mean(0)\n")
    file = tmp_path / "mine.py"
    file.write_text("import helper_beside_it\n" + BROKEN.format("helper_beside_it.mean(site.stack)"))
    recipe.write_text("models: {a: a, b: b}\nmethod: broken\n")
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--plugin", str(file)]) == 0
    assert not list(tmp_path.rglob("__pycache__"))
    assert sys.dont_write_bytecode is False


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", "x = 1\n", r'none\.py: it defines no method; write class Mine\(Method, name="mine"\)'),
        ("bad.py", "x = 1\ny = (\n", r"bad\.py:2: SyntaxError: "),
        ("boom.py", "\n\n1 / 0\n", r"boom\.py:3: ZeroDivisionError: division by zero$"),
        ("gone.py", None, r"gone\.py: no such file$"),
        ("notes.txt", "", r"notes\.txt: not a python file, named \.py$"),
        (
            "twice.py",
            EXAMPLE.read_text().replace('"median"', '"ties"'),
            r"twice\.py: a method is called 'ties' already \(weightsmith\.methods\.ties\); give this one another name$",
        ),
    ],
)
@pytest.mark.usefixtures("registry")
def test_files_that_are_no_plugin(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_file(tmp_path / name)


def test_an_installed_package_adds_a_method(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "median_method-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: median-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[weightsmith.methods]\nmedian = median_method\n")
    (site / "median_method.py").write_text(EXAMPLE.read_text())
    recipe.write_text("models: {a: a, b: b, c: base}\nmethod: median\n")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from weightsmith.cli.main import main; "
        f"sys.exit(main(['merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for tensor in load_tensors(tmp_path / "out/model.safetensors").values():
        assert tensor == pytest.approx(1.0)


def test_a_module_without_a_file_is_no_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = types.ModuleType("made")
    made.__file__ = "_made.py"  # as torch._classes
    monkeypatch.setitem(sys.modules, "made", made)
    assert neighbours(tmp_path / "score.py") == ()


def test_an_evaluator_that_has_changed_is_run_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "score.py"
    file.write_text("print('here')\ndef scores(model, split):\n    return {'a': 1}\n")
    first = run_once(file, "--evaluator")
    assert capsys.readouterr() == ("", "here\n")  # of a report in JSON it is no part
    assert run_once(file, "--evaluator") is first
    file.write_text("def scores(model, split):\n    return {'a': 2}\n")
    assert run_once(file, "--evaluator").scores("", "") == {"a": 2}
    file.unlink()
    with pytest.raises(RecipeError, match="no such file"):
        run_once(file, "--evaluator")


@pytest.mark.parametrize("command", ["--help", "methods"])
def test_the_list_of_what_there_is_says_how_a_method_of_ones_own_comes_in(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("A method of your own is one Python file: --plugin FILE")
    file = Path(__file__).parents[2] / last.removesuffix(".").split()[-1]
    assert file.is_file()
