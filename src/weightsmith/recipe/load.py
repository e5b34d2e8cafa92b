"""Models of files: YAML or JSON in, a frozen model out, or every problem at once with its position.

Paths.  A model, statistics folder or tokenizer that exists relative to the file's own folder is
meant by it and made absolute; otherwise the text is left as it is (a path from the working
directory, or a hub id).  A model ending in .yaml, .yml or .json is a recipe of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from weightsmith.core.errors import RecipeError
from weightsmith.recipe.files import expanded, text_of
from weightsmith.recipe.grammar import Grammar, Reading, build, listing, mapping
from weightsmith.recipe.reader import read_all
from weightsmith.recipe.schema import Recipe

__all__ = ["load", "loads", "read_file", "read_text", "skeleton"]

_MAX_NESTED = 200

G = TypeVar("G", bound=Grammar)


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> Recipe:
    """Read a recipe; see `read_file`."""
    return read_file(Recipe, path, overrides, files)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: str | Path | None = None) -> Recipe:
    """Read a recipe from text; see `read_text`."""
    return read_text(Recipe, text, where, overrides, folder)


def read_file(kind: type[G], path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> G:
    """Read a file as a model.  `overrides` are texts like 'parameters.density=0.3', applied before it is checked.

    `files` takes the paths of all files that were read: this one, and those of nested recipes.
    Raises RecipeError with all problems, one line each: file, line, column, what is wrong, the nearest valid word.
    """
    return _Loader(files).file(kind, expanded(path), overrides)


def read_text(
    kind: type[G],
    text: str,
    where: str = "recipe",
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
) -> G:
    """Read a model from text; `where` is what messages call it, `folder` what its paths are relative to."""
    return _Loader().text(kind, text, where, None if folder is None else Path(folder), overrides)


_PLACE = ("model", "adapter", "revision", "layers", "expert")
_SELECTOR = ("match", "role", "layers", "optional")


def skeleton(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """The models and selectors of a recipe that is faulty elsewhere: what can still be held against the files.

    Rules that are faulty themselves are left out; None where nothing can be told.
    """
    place = expanded(path)
    try:
        tree = mapping(Recipe.document(read_all(text_of(place), str(path)), overrides).tree)
    except RecipeError:
        return None
    models = {n: _part(ref, _PLACE) if isinstance(ref, dict) else ref for n, ref in mapping(tree.get("models")).items()}
    told: dict[str, Any] = {"method": "average", "models": models, **_part(tree, ("base",))}
    if _made(told, place) is None:
        return None
    if _made(told | _part(tree, ("exclude",)), place) is not None:
        told |= _part(tree, ("exclude",))
    rules = [_part(mapping(rule), _SELECTOR) | {"method": "keep"} for rule in listing(tree.get("rules"))]
    # A faulty one keeps its place, so that the others keep their numbers.
    told["rules"] = [
        rule if _made(told | {"rules": [rule]}, place) else {"method": "keep", "optional": True} for rule in rules
    ]
    return _made(told, place)


def _part(tree: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: tree[key] for key in keys if key in tree}


def _made(tree: dict[str, Any], place: Path) -> Recipe | None:
    try:
        return read_text(Recipe, json.dumps(tree), str(place), folder=place.absolute().parent)
    except (RecipeError, TypeError):
        return None


class _Loader:
    """One call of `read_file`: the files that are open (to find loops), all that were read, and how many recipes."""

    def __init__(self, files: list[Path] | None = None) -> None:
        self.open: list[Path] = []
        self.files = [] if files is None else files
        self.recipes = 0

    def file(self, kind: type[G], path: Path, overrides: Sequence[str] = ()) -> G:
        text = text_of(path)
        real = path.resolve()
        if real in self.open:
            chain = " -> ".join(p.name for p in [*self.open[self.open.index(real) :], real])
            raise RecipeError(f"{path}: circular reference between recipes: {chain}")
        self.open.append(real)
        self.files.append(real)
        try:
            return self.text(kind, text, str(path), path.absolute().parent, overrides)
        finally:
            self.open.pop()

    def text(self, kind: type[G], text: str, where: str, folder: Path | None, overrides: Sequence[str]) -> G:
        document = kind.document(read_all(text, where), overrides)

        def count() -> None:
            self.recipes += 1
            if self.recipes > _MAX_NESTED:
                raise RecipeError(f"{where}: more than {_MAX_NESTED} nested recipes")

        reading = Reading(folder, lambda path: self.file(Recipe, expanded(path)), count)
        return build(kind, document, reading)
