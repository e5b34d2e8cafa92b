"""The documentation builds without a warning, and its reference says all that the code declares."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightsmith.cli import main as cli
from weightsmith.core.method import registered
from weightsmith.inspect.advice import RULES
from weightsmith.recipe.schema import ModelRef, Output, Recipe, Rule

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from _generate import generate, markdown, pages, problems_by_method  # noqa: E402  (it lies beside the pages)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("index", "tutorial", "choose", "howto/adapters", "explanation/safety", "decisions"):
        assert (tmp_path / "html" / f"{name}.html").exists()
    ties = (tmp_path / "html/reference/_generated/methods/ties.html").read_text()
    assert "2306.01708" in ties
    assert "share of each task vector kept" in ties


def test_every_method_has_a_page_with_every_parameter(made: dict[str, str]) -> None:
    own = {name: cls for name, cls in registered().items() if cls.__module__.startswith("weightsmith.")}
    assert len(own) > 40
    for name, cls in own.items():  # tests of plug-ins may have registered more
        page = made[f"methods/{name}.md"]
        assert f"[{name}](methods/{name}.md)" in made["methods.md"]
        assert f"\n  methods/{name}\n".strip() in made["methods.md"]
        for parameter in cls.parameters():
            assert f"| `{parameter.name}` |" in page


def test_every_page_says_which_problems_the_method_is_for(made: dict[str, str]) -> None:
    problems = problems_by_method((DOCS / "choose.md").read_text("utf-8"))
    assert all("\n| when |" in made[f"methods/{name}.md"] for name in problems)
    assert problems["dare"] == ("Many experts that get in each other's way",)
    want = "| when | [LoRA adapters](../../../choose.md#lora-adapters) |"
    assert want in made["methods/knots.md"]


def test_the_recipe_page_has_every_key(made: dict[str, str]) -> None:
    for cls in (Recipe, ModelRef, Rule, Output):
        for key in cls.model_fields:
            assert f"| `{key}` |" in made["recipe.md"]


def test_the_pages_of_rules_and_layers_have_them_all(made: dict[str, str]) -> None:
    for rule in RULES:
        assert "| `" + rule.condition.replace("|", "\\|") + "` |" in made["advice.md"]
    assert "{" not in made["advice.md"]
    order = re.findall(r"^\| `(\w+)` \| ([A-Z].+) \|$", made["layers.md"], re.MULTILINE)  # each says what is in it
    parts = {path.stem for path in (ROOT / "src/weightsmith").iterdir() if not path.name.startswith("_")}
    assert {name for name, _ in order} == parts - {"py"}
    assert order[0][0] == "cli"


def test_the_command_line_page_has_every_verb_and_option(made: dict[str, str]) -> None:
    for verb in cli._VERBS:
        assert f"## weightsmith {verb}" in made["cli.md"]
    for option in ("--resume", "--overwrite", "--dry-run", "--stat", "--consensus", "--rerun", "--plugin"):
        assert option in made["cli.md"]
    assert "Exit codes" in made["cli.md"]
    assert "\x1b" not in made["cli.md"]


def test_links_to_methods_lead_somewhere(made: dict[str, str]) -> None:
    text = (DOCS / "choose.md").read_text()
    found = set(re.findall(r"reference/_generated/(methods/\w+\.md)", text))
    assert found <= made.keys()
    left_out = {Path(name).stem for name in made if name.startswith("methods/")} - {Path(f).stem for f in found}
    assert not left_out, "a method that no problem leads to"


def test_pages_of_methods_that_are_gone_go(tmp_path: Path) -> None:
    (tmp_path / "out/methods").mkdir(parents=True)
    (tmp_path / "out/methods/gone.md").write_text("# gone\n")
    generate(tmp_path / "out")
    assert not (tmp_path / "out/methods/gone.md").exists()
    assert (tmp_path / "out/methods/ties.md").exists()


@pytest.mark.parametrize(
    ("doc", "wanted"),
    [
        ("a * b and c * d", "a \\* b and c \\* d"),
        ("`a_b` and a_b", "`a_b` and a\\_b"),
        ("text\nkey    meaning\nother  more\n       goes on", "text\n\n- `key`: meaning\n- `other`: more goes on"),
        ("key  meaning\nA sentence.", "- `key`: meaning\n\nA sentence."),
        ("a/b  both", "- `a/b`: both"),
        ("1. first\n   goes on\n2. second", "1. first goes on\n2. second"),
    ],
)
def test_docstrings_as_markdown(doc: str, wanted: str) -> None:
    assert markdown(doc) == wanted
