"""Recipes as texts that are edited: single values changed in place, live checks, the plan."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, WeightsmithError, problems_of
from weightsmith.core.problem import Code, Problem
from weightsmith.plan.plan import Plan
from weightsmith.recipe.files import SUFFIXES, exists, text_of
from weightsmith.recipe.load import loads
from weightsmith.recipe.reader import Location, read, read_all
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.text import flow
from weightsmith.studio.places import Places, strings

__all__ = ["Look", "changed", "look", "plan", "renamed", "value_of", "written"]

_NESTED = 200


@dataclass(frozen=True)
class Look:
    """A recipe's text as far as it can be read: its values, the recipe if there is nothing wrong, else the problems.

    foreign  it is a config of mergekit, whose fields are others
    """

    tree: Any
    recipe: Recipe | None
    problems: tuple[Problem, ...]
    foreign: bool = False


def look(places: Places, path: Path, text: str) -> Look:
    """Read a text as the command line would, but nothing outside the folders."""
    try:
        documents = read_all(text, path.name)
        tree = documents[-1].tree
        foreign = len(documents) > 1 or (isinstance(tree, Mapping) and "merge_method" in tree)
        outside = list(_outside(places, tree, path.parent, set()))
        if outside:
            texts = (f"{one!r} is outside the folders that the studio was started with" for one in outside)
            return Look(tree, None, tuple(Problem(Code.INPUT, "", line) for line in texts), foreign)
    except WeightsmithError as error:
        return Look(None, None, problems_of(error))
    try:
        return Look(tree, loads(text, path.name, folder=path.parent), (), foreign)
    except WeightsmithError as error:
        return Look(tree, None, problems_of(error), foreign)


def _outside(places: Places, tree: Any, folder: Path, seen: set[Path]) -> Iterator[str]:
    """What leads out of the folders, in a recipe and in the recipes that it names: all of it before any is opened."""
    yield from places.strangers(tree, folder)
    for text in strings(tree):
        path = folder / text
        if not text.lower().endswith(SUFFIXES) or not places.holds(path) or not exists(path) or not path.is_file():
            continue
        real = path.resolve()
        if real not in seen and len(seen) < _NESTED:
            seen.add(real)
            for document in read_all(text_of(path), text):
                yield from _outside(places, document.tree, path.parent, seen)


def plan(recipe: Recipe, out: Path | None, overwrite: bool = False) -> Plan | tuple[Problem, ...]:
    """The plan of a merge with all its problems; the problems alone where an input cannot be opened."""
    from weightsmith.jobs.merge import preview

    try:
        return preview(recipe, out, overwrite=overwrite)
    except WeightsmithError as error:
        return problems_of(error)


def written(path: Path, folder: Path) -> str:
    """A path as a recipe in `folder` writes it."""
    real = path.resolve()
    return os.path.relpath(real, folder.resolve()) if folder.resolve() in real.parents else str(real)


def value_of(text: str) -> Any:
    """What is meant by a text in a field: a number, a word, a list, a mapping; RecipeError for bad YAML."""
    return read(text, "the field").tree if text.strip() else None


def changed(text: str, location: Location, value: Any) -> str:
    """The text with one value changed (None: taken out), comments and order kept."""
    return _edited(text, location, lambda yaml, made: _set(made, location, _node(yaml, value)))


def renamed(text: str, location: Location, old: str, new: str) -> str:
    """The text with a key of the mapping at `location` called otherwise, in its place."""

    def rename(yaml: Any, made: Any) -> None:
        inner = made
        for step in location:
            inner = inner[_key(inner, step)]
        key = _key(inner, old)
        place, comment = list(inner).index(key), inner.ca.items.pop(key, None)
        inner.insert(place, new, inner.pop(key))
        if comment is not None:
            inner.ca.items[new] = comment

    return _edited(text, (*location, old), rename)


def _edited(text: str, location: Location, edit: Callable[[Any, Any], None]) -> str:
    """The text after a change of what is read of it.

    The text was read strictly before: what ruamel's round-trip loader builds of it is plain containers.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    tree = read_all(text, "the recipe")[-1].tree  # refuses bombs, tags, duplicate keys
    if not isinstance(tree, dict):
        raise RecipeError("the recipe is not a mapping; mend the YAML first")
    yaml = YAML(typ="rt")
    yaml.preserve_quotes, yaml.width, yaml.allow_unicode = True, 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda own, _: own.represent_scalar("tag:yaml.org,2002:null", "null"))
    try:
        made = yaml.load(text)
        edit(yaml, made)
        stream = io.StringIO()
        yaml.dump(made, stream)
    except (YAMLError, AttributeError, LookupError, TypeError, ValueError):
        place = ".".join(map(str, location))
        raise RecipeError(f"the form cannot change {place} as the YAML stands; change it there") from None
    return stream.getvalue()


def _node(yaml: Any, value: Any) -> Any:
    """A value as the loader would have made it: small things on one line."""
    return yaml.load(flow(value)) if isinstance(value, (Mapping, list)) else value


def _key(inner: Any, step: str | int) -> Any:
    """The key as the loader has it: `1` is a number to it, and a name to the recipe."""
    words = {str(key): key for key in inner} if isinstance(inner, Mapping) else {}
    return words.get(str(step), step)


def _set(tree: Any, location: Location, value: Any) -> None:
    *above, last = location
    chain = [tree]
    for i, step in enumerate(above):
        inner = chain[-1]
        above[i] = step = _key(inner, step)
        following = inner[step] if isinstance(step, int) else inner.get(step)
        if following is None or isinstance(following, str):
            following = {"model": following} if isinstance(following, str) else {}
            inner[step] = following
            following = inner[step]
        chain.append(following)
    last = _key(chain[-1], last)
    if value is not None:
        if isinstance(chain[-1], list) and last == len(chain[-1]):
            chain[-1].append(value)
        else:
            chain[-1][last] = value
        return
    if isinstance(last, int):
        del chain[-1][last]
    else:
        chain[-1].pop(last, None)
    for step, owner, inner in reversed(list(zip(above, chain, chain[1:], strict=False))):
        if len(inner) or step == "models":
            if isinstance(inner, dict) and set(inner) == {"model"}:  # the short form again
                owner[step] = inner["model"]
            return
        del owner[step]
