"""Single values set from the command line: KEY=VALUE over a parsed recipe."""

from __future__ import annotations

from typing import Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.recipe.reader import Document, Location, Position, read, spell

__all__ = ["override"]


def override(document: Document, text: str) -> None:
    """Set one value in place, as 'rules.0.parameters.weight=0.5'."""
    path, equals, value = text.partition("=")
    label = f"--set {text}"
    if not equals or not path.strip():
        raise RecipeError(f"{label}: write it as KEY=VALUE, e.g. parameters.density=0.3")
    target = document.tree
    if not isinstance(target, dict):
        return  # not a recipe at all; the loader says so
    location: Location = ()
    words = path.strip().split(".")
    while True:
        step, words = _step(target, words, label)
        location = (*location, step)
        if not words:
            break
        new = location == ("models", step) and isinstance(target, dict) and step not in target
        if new and words[0] != "model":
            hint = did_you_mean(str(step), target)
            raise RecipeError(f"{label}: no model is called {step!r}{hint}")
        if not isinstance(step, int) and step not in target:
            target[step] = {}
            document.positions[location] = Position(label)
        inner = target[step]
        if inner is None or (isinstance(inner, str) and location[0] in ("base", "models")):
            inner = target[step] = {} if inner is None else {"model": inner}
        if not isinstance(inner, (dict, list)):
            hint = f"; write parameters.{words[-1]}" if location == ("method",) else ""
            raise RecipeError(f"{label}: {spell(location)} is {inner!r}; it has no {words[0]!r} inside{hint}")
        target = inner
    # Globs need no second pair of quotes here: nothing on a command line can be a YAML alias.
    glob = value.startswith("*")
    target[step] = value if glob else read(value, label).tree if value.strip() else None
    for known in [known for known in document.positions if known[: len(location)] == location]:
        del document.positions[known]
    document.positions[location] = Position(label)


def _step(target: Any, words: list[str], label: str) -> tuple[Any, list[str]]:
    """The next key (the longest known one, since names may hold dots) and the words after it."""
    if isinstance(target, list):
        if not words[0].isdigit() or int(words[0]) >= len(target):
            raise RecipeError(f"{label}: {words[0]!r} is not a position in a list of {len(target)}; the first is 0")
        return int(words[0]), words[1:]
    for n in range(len(words), 0, -1):
        if ".".join(words[:n]) in target:
            return ".".join(words[:n]), words[n:]
    return words[0], words[1:]
