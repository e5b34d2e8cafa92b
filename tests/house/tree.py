"""The source tree as a house: its layers, its imports, one traced merge."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

__all__ = ["LAYERS", "METHODS_MAY", "ROOT", "House", "length", "level", "part"]

ROOT = Path(__file__).parent.parent.parent

LAYERS = (
    ("core",),
    ("method", "plugins", "report"),
    ("kernels",),
    ("ops",),
    ("methods", "codecs"),
    ("io",),
    ("tokens",),
    ("recipe",),
    ("inputs", "devices"),
    ("plan",),
    ("engine",),
    ("jobs",),
    ("observe",),
    ("align", "experts", "inspect", "lora", "moe", "train"),
    ("study",),
    ("protect", "runtime", "tune", "vsa"),
    ("search",),
    ("studio",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Bottom first.  A part imports what lies below it; parts of one layer do not know each other."""

METHODS_MAY = {"core", "ops", "methods", "codecs"}
"""A method knows no file, no device and no plan."""


class House:
    """The source tree that is measured; `source` holds the package."""

    def __init__(self, source: Path) -> None:
        self.source = source.resolve()
        self.package = self.source / "weightsmith"
        self.files = sorted(self.package.rglob("*.py"))

    def module(self, path: Path) -> str:
        """'plan.plan' for weightsmith/plan/plan.py, 'plan' for the package itself, '__init__' for the outermost."""
        pieces = path.relative_to(self.package).with_suffix("").parts
        return ".".join(pieces[:-1] if pieces[-1] == "__init__" and len(pieces) > 1 else pieces)

    @cached_property
    def trees(self) -> Mapping[str, ast.Module]:
        return {self.module(path): ast.parse(path.read_text()) for path in self.files}

    @cached_property
    def nodes(self) -> list[tuple[str, ast.AST]]:
        """(module, node) for every node of every tree."""
        return [(module, node) for module, tree in self.trees.items() for node in ast.walk(tree)]

    @cached_property
    def imports(self) -> Mapping[str, set[str]]:
        """Module -> the modules of the package that it imports, anywhere but under TYPE_CHECKING."""
        found = {module: set(map(self._ours, _imported(tree.body))) for module, tree in self.trees.items()}
        for module, node in self.nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found[module].update(self._ours(str(arg.value)) for arg in node.args if isinstance(arg, ast.Constant))
        return {module: names - {""} for module, names in found.items()}

    def _ours(self, name: str) -> str:
        """'plan.plan' for 'weightsmith.plan.plan' and 'weightsmith.plan.plan.Plan'; '' for other packages."""
        outer, _, inner = name.partition(".")
        if outer != "weightsmith":
            return ""
        return next((m for m in (inner, inner.rpartition(".")[0]) if m in self.trees), "__init__")

    @cached_property
    def arrows(self) -> Mapping[str, list[str]]:
        """'part -> part' of imports that run upwards or sideways -> those imports."""
        found: dict[str, list[str]] = {}
        for module, targets in self.imports.items():
            for target in sorted(targets):
                here, there = part(module), part(target)
                if here != there and level(there) >= level(here) and module != "__main__" and there != "__init__":
                    found.setdefault(f"{here} -> {there}", []).append(f"{module} imports {target}")
        return found

    @cached_property
    def circles(self) -> list[list[str]]:
        """Sets of modules that import each other, over whatever way."""
        return [sorted(group) for group in _knots(self.imports) if len(group) > 1]

    @cached_property
    def trace(self) -> Any:
        """What `house.trace` finds."""
        path = os.pathsep.join([str(self.source), str(Path(__file__).parent.parent)])
        words = [sys.executable, "-m", "house.trace", str(self.source)]
        done = subprocess.run(
            words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the traced merge failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)

    @cached_property
    def back_up(self) -> list[str]:
        """Calls from a lower layer into a higher one that go around the contract of a class."""
        return [
            f"{'.'.join(caller)} calls {'.'.join(callee)}"
            for caller, callee, dispatched in self.trace["calls"]
            if level(part(callee[0])) > level(part(caller[0])) and not dispatched
        ]

    def classes(self, *folders: str) -> Iterator[ast.ClassDef]:
        """The stages that these folders define: classes with a `name=`."""
        for module, tree in self.trees.items():
            if part(module) in folders:
                for node in tree.body:
                    if isinstance(node, ast.ClassDef) and any(word.arg == "name" for word in node.keywords):
                        yield node

    def named(self, name: str) -> ast.ClassDef | None:
        """A class of core/."""
        nodes = (node for module, tree in self.trees.items() if part(module) == "core" for node in tree.body)
        return next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)

    def lines(self, *parts: str) -> int:
        """Lines of source besides comments, of which there are to be more; of some parts or of all."""
        chosen = [path for path in self.files if not parts or part(self.module(path)) in parts]
        return sum(not line.lstrip().startswith("#") for path in chosen for line in path.read_text().splitlines())


# --- parts and graphs ----------------------------------------------------------------------------


def length(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


def part(module: str) -> str:
    """'plan.plan' -> 'plan'."""
    return module.partition(".")[0]


def level(name: str) -> int:
    """Height of a part's layer."""
    found = [height for height, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no place in LAYERS"
    return found[0]


def _imported(statements: Iterable[ast.AST]) -> Iterator[str]:
    """Full names of what statements import some day: those under `if TYPE_CHECKING:` never do."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imported(node.orelse)
        else:
            for block in ("body", "orelse", "handlers", "finalbody", "cases"):
                inner = getattr(node, block, ())  # the body of a lambda is an expression
                yield from _imported(inner if isinstance(inner, list) else ())


def _knots(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Strongly connected components: everything that can be reached from each other."""

    @cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        left = list(graph[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += graph.get(name, ())
        return frozenset(seen)

    found: list[set[str]] = []
    for name in graph:
        if not any(name in group for group in found):
            found.append({name} | {other for other in reached(name) if name in reached(other)})
    return found
