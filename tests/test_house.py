"""The house's own rules: imports run one way, files stay short, imports stay light, nothing private leaks in."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "weightsmith"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 420

# A module may import from its own layer and from those below it, also where it does so lazily.
LAYERS = (
    ("core", "report"),
    ("method", "plugins"),
    ("kernels", "ops"),
    ("methods", "codecs"),
    ("io",),
    ("tokens",),
    ("recipe",),
    ("inputs",),
    ("plan",),
    ("engine",),
    ("jobs",),
    ("observe", "inspect", "moe", "lora"),
    ("study",),
    ("cli",),
)
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
METHODS_MAY = {"core", "ops", "methods"}

UPWARDS = {
    ("plan.plan", "engine"),
    ("plan.reading", "engine"),
    ("recipe.schema", "jobs"),
    ("recipe.schema", "recipe.load"),
}
"""Module -> layer or module: the arrows that still point upwards, or make a circle; none is to be added."""


def part(module: str) -> str:
    """The part of the house a module belongs to: 'weightsmith.plan.plan' -> 'plan'."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def module_of(path: Path) -> str:
    pieces = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


MODULES = {module_of(path) for path in FILES}


@cache
def imported(path: Path) -> list[str]:
    """Full names of the weightsmith modules that a file imports, at its top or later (not under TYPE_CHECKING)."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(name if name in MODULES else str(node.module) for name in inner)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return [name for name in dict.fromkeys(found) if name.split(".")[0] == "weightsmith"]


def upwards(path: Path, module: str) -> set[tuple[str, str]]:
    """Those of `UPWARDS` that a file's import is."""
    here, there = module_of(path), f"{module}."
    return {(a, b) for a, b in UPWARDS if here == f"weightsmith.{a}" and there.startswith(f"weightsmith.{b}.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here in ("__init__", "__main__"):
        return
    assert here in LEVEL, f"{here} has no place in LAYERS"
    for module in imported(path):
        target = part(module)
        if not target:
            continue  # `from weightsmith import __version__`
        down = LEVEL[target] <= LEVEL[here] or upwards(path, module)
        assert down, f"{path.name} ({here}) imports {module}, which lies above it"
        if here in ("methods", "codecs"):
            assert target in METHODS_MAY | {here}, f"a method knows nothing of {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_there_are_no_import_cycles() -> None:
    """Lazy imports count: a circle through them only works as long as nobody moves an import to the top."""
    graph = {module_of(path): [m for m in imported(path) if not upwards(path, m)] for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module in done or module not in graph:
            return
        for target in graph[module]:
            if target != "weightsmith":
                visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    there = {arrow for path in FILES for module in imported(path) for arrow in upwards(path, module)}
    assert there == UPWARDS, f"cut, so to be taken out of UPWARDS: {UPWARDS - there}"


HEAVY = ("torch", "transformers", "peft", "plotly", "scipy", "numba", "huggingface_hub", "ray", "sklearn")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import weightsmith",
        "import weightsmith.core.method; weightsmith.core.method.registered()",
        "import weightsmith.plan.plan",
        "import weightsmith.jobs.merge",
        "import weightsmith.cli.main",
    ],
)
def test_imports_stay_light(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_the_project_does_not_talk_about_its_making() -> None:
    words = re.compile(
        r"\b(this session|helper agent|golden issue|/work/|/tmp/v/|shared/methods|shared/goldens)\b|/work/"
    )
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    here = Path(__file__).name
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".txt") and path.name != here and path.exists():
            found = words.search(path.read_text(errors="replace"))
            assert not found, f"{name}: {found.group(0)!r}"
