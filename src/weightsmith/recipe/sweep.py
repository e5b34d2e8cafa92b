"""Several values for one key: `--set parameters.density=0.1,0.2,0.4` stands for three recipes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from weightsmith.core.errors import RecipeError
from weightsmith.recipe.load import load
from weightsmith.recipe.schema import Recipe

__all__ = ["MOST", "expand", "load_variants", "several"]

MOST = 1000
"""Variants of one sweep: each is a whole model on the disk."""

_LONGEST = 200  # characters of a folder's name; what is written beside it has a longer one, and 255 is the limit
_PAIRS = {"[": "]", "{": "}", "(": ")"}


def several(assignment: str) -> list[str]:
    """The values of 'KEY=VALUE,VALUE,...'; commas inside brackets or quotes belong to a value."""
    values, expected, quote = [""], [], ""
    for character in assignment.partition("=")[2]:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _PAIRS:
            expected.append(_PAIRS[character])
        elif expected and character == expected[-1]:
            expected.pop()
        elif character == "," and not expected:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values] if len(values) > 1 else values


def expand(assignments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every combination of the values given: folder name -> assignments with one value each.

    The name holds what differs, as 'density=0.1,lambda=0.5'.  Without a list there is one variant, named ''.
    Raises RecipeError for an empty value in a list, for two variants with one name, and for too many.
    """
    choices = [several(text) for text in assignments]
    swept = [i for i, values in enumerate(choices) if len(values) > 1]
    count = math.prod(len(values) for values in choices)
    if count > MOST:
        raise RecipeError(f"--set: {count} variants; at most {MOST} are made in one run")
    for i in swept:
        if "" in choices[i]:
            raise RecipeError(
                f"--set {assignments[i]}: an empty value in a list; write [] around a list that is one value"
            )
    paths = [text.partition("=")[0].strip() for text in assignments]
    short = [path.rpartition(".")[2] for path in paths]
    common = [short[i] for i in swept]
    labels = [path if common.count(word) > 1 else word for word, path in zip(short, paths, strict=True)]
    found: dict[str, tuple[str, ...]] = {}
    for combination in product(*choices):
        name = ",".join(f"{_safe(labels[i])}={_safe(combination[i])}" for i in swept)
        if name in found:
            raise RecipeError(f"--set: two variants would be called {name!r}; give every value once")
        if len(name) > _LONGEST:
            raise RecipeError(f"--set: {name[:40]}... is too long for a folder's name; sweep over fewer keys at once")
        found[name] = tuple(
            f"{path}={value}" if "=" in text else text
            for path, value, text in zip(paths, combination, assignments, strict=True)
        )
    return found


def load_variants(
    path: str | Path, assignments: Sequence[str], files: list[Path] | None = None
) -> Mapping[str, Recipe]:
    """The recipes that a file and its `--set` options stand for, by folder name; see `expand`.

    `files` takes the paths of all files that were read.
    """
    return {name: load(path, chosen, files) for name, chosen in expand(assignments).items()}


def _safe(text: str) -> str:
    """Text as part of a folder's name on any system."""
    return re.sub(r"[^\w.+=-]+", "_", text.strip("\"' "), flags=re.ASCII) or "_"
