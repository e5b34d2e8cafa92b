"""Every command, recipe and Python block of the pages written by hand runs, and prints what the page says."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from doc_blocks import Page, blocks

from weightsmith.core import method

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *(DOCS / f"{p}.md" for p in ("index", "tutorial", "choose", "mergekit")),
    *sorted((DOCS / "howto").glob("*.md")),
]
NOT_RUN = {"README.md": 1, "docs/tutorial.md": 1, "docs/howto/bench.md": 1, "docs/howto/remote.md": 1}
"""Blocks marked norun, by page: pip install; a study that takes several."""
RUNS = {"python", "commands", "recipe", "output", "file"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models of the tutorial; methods that a page registers are forgotten after it."""
    method.registered()
    monkeypatch.setattr(method, "_registered", dict(method._registered))
    monkeypatch.chdir(tmp_path)
    # `python` in a page is this one, also where it is weightsmith that starts it.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return tmp_path


def make_models() -> None:
    (maker,) = (b for b in blocks(text_of(DOCS / "tutorial.md")) if b.option("file") == "make_models.py")
    exec(compile(maker.text, "make_models.py", "exec"), {})


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(path: Path) -> None:
    text = text_of(path)
    name = path.relative_to(ROOT).as_posix()
    if name != "docs/tutorial.md":  # which makes them itself
        make_models()
    if name == "README.md":  # its commands come before the recipe they are about
        recipe = next(b for b in blocks(text) if b.language == "yaml")
        Path("recipe.yaml").write_text(recipe.text)
    page = Page(name, text, MAKEFILE)
    page.run()
    assert page.counts["not run"] == NOT_RUN.get(name, 0)
    assert page.counts.total() == len(page.blocks)
    if path.stem != "index":
        assert sum(page.counts[kind] for kind in RUNS) >= 3, f"{name}: {dict(page.counts)}"


def test_no_fence_goes_unseen() -> None:
    for path in PAGES:
        text = text_of(path)
        fences = sum(line.lstrip().startswith("```") for line in text.splitlines())
        assert fences == 2 * len(list(blocks(text))), path


def test_the_example_plugin_is_the_tested_one() -> None:
    (example,) = (b for b in blocks(text_of(DOCS / "howto/plugin.md")) if b.option("file") == "median.py")
    assert example.text == (ROOT / "tests/cli/example_plugin.py").read_text(encoding="utf-8")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nassert 1 == 2, 'unequal'\n```", "unequal"),
        ("```yaml\nmodels: {a: x}\nmethod: tise\n```", "did you mean 'ties'"),
        ("```sh\nweightsmith methods tise\n```", "exit code 2"),
        ("```sh\nrm -r x\n```", "cannot be run here"),
        ("```sh\nmake nothing\n```", "no target nothing"),
        ("```python\nprint(1)\n```\n```text output\n2\n```", "printed:\n1"),
        ("```yml\na: 1\n```", "unknown kind of block"),
        ("```sh skip\nmake test\n```", "unknown words"),
    ],
)
def test_a_wrong_block_is_noticed(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Page("page", text, "test:\n").run()
    assert "in the block at page:" in "".join(caught.value.__notes__)


@pytest.mark.usefixtures("folder")
def test_blocks_are_counted() -> None:
    page = Page("page", "```text\nx\n```\n\n```sh norun\nboom\n```\n```{toctree}\na\n```\n```python\n1\n```\n", "")
    page.run()
    assert page.counts == Counter({"illustration": 1, "not run": 1, "directive": 1, "python": 1})
