"""Places where a decision hangs on the wording of a message: whoever decides asks for a code (`core.problem.Code`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

__all__ = ["FOREIGN", "decided_by_words"]

FOREIGN = {
    "devices.accelerator": "torch tells a failed allocation by its words only",
    "io.read.pickle": "torch's unpickler names the code that it refuses in its words only",
    "io.read.remote": "the place is cut off before it is put in front again",
    "cli.main": "cyclopts lists all commands behind its own words",
    "recipe.grammar": "punctuation between a location and a text",
}
"""Module -> why it looks into a message; those of other libraries have no code."""

_SPEAKING = {"text", "reason", "hint", "remark", "problem", "warning", "complaint", "problems", "warnings"}
"""Attributes that hold messages, and the names of variables for them where they come from one."""

_ASKING = {
    "startswith",
    "endswith",
    "find",
    "index",
    "count",
    "partition",
    "rpartition",
    "removeprefix",
    "removesuffix",
}
_PATTERNS = {"search", "match", "fullmatch", "findall", "finditer"}


def decided_by_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and source of every question about the words of an error, a problem or a warning."""
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))]:
        own = list(_own(function))
        errors = {node.name for node in own if isinstance(node, ast.ExceptHandler) and node.name}
        errors |= {node.id for node in own if isinstance(node, ast.Name) and node.id in ("error", "exc")}
        messages = _bound(own, errors)
        for node in own:
            if _asks(node, errors, messages):
                yield node.lineno, ast.unparse(node)  # type: ignore[attr-defined]


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, or of a module, without those of the functions inside it."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, ast.FunctionDef):
            yield from _own(child)


def _bound(nodes: list[ast.AST], errors: set[str]) -> set[str]:
    """Variables that hold a message: made of an error's words, or one of several problems."""
    found: set[str] = set()
    for _ in range(2):  # what is made of another one too
        for node in nodes:
            if isinstance(node, ast.Assign) and _speaks(node.value, errors, found):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.NamedExpr) and _speaks(node.value, errors, found):
                found.add(node.target.id)
            elif isinstance(node, (ast.For, ast.comprehension)) and _speaks(node.iter, errors, found):
                found |= {one.id for one in ast.walk(node.target) if isinstance(one, ast.Name)}
    return found


def _speaks(node: ast.AST, errors: set[str], messages: set[str]) -> bool:
    """Whether a value is a message, or some of one."""
    if isinstance(node, ast.Name):
        return node.id in messages
    if isinstance(node, ast.Attribute):
        return node.attr in _SPEAKING
    if isinstance(node, ast.Subscript):
        return _speaks(node.value, errors, messages)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in ("str", "repr") and node.args and isinstance(node.args[0], ast.Name):
            return node.args[0].id in errors or node.args[0].id in messages
        if name in ("problems_of", "did_you_mean", "nearest"):
            return True
        if name == "join" and len(node.args) == 1:
            return _speaks(node.args[0], errors, messages)
        if isinstance(node.func, ast.Attribute) and name in ("strip", "split", "splitlines", "lower", *_ASKING):
            return _speaks(node.func.value, errors, messages)
    return False


def _asks(node: ast.AST, errors: set[str], messages: set[str]) -> bool:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        words = any(isinstance(side, (ast.JoinedStr, ast.Constant)) and _is_text(side) for side in sides)
        asked = all(isinstance(op, (ast.In, ast.NotIn, ast.Eq, ast.NotEq)) for op in node.ops)
        return words and asked and any(_speaks(side, errors, messages) for side in sides)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in _ASKING:
            return _speaks(node.func.value, errors, messages)
        if node.func.attr in _PATTERNS:
            return any(_speaks(arg, errors, messages) for arg in node.args)
    return False


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
