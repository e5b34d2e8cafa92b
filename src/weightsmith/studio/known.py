"""Names of models that are not there, and the nearest of those that the Models page knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.problem import Code, Problem
from weightsmith.io.read.hub import looks_like_hub_id
from weightsmith.studio import hub
from weightsmith.studio.places import Places
from weightsmith.studio.recipes import written
from weightsmith.studio.shelf import shelf

__all__ = ["mistyped", "near", "nearer"]

_MODELS = ("model", "adapter", "base", "models")
_LONGEST = 500


def near(text: str, names: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest name, whole or by its last part; '' where none is near."""
    if len(text) > _LONGEST:
        return ""
    known, found = list(names), text.rstrip("/").removeprefix("./").lower()
    whole = {name.lower(): name for name in reversed(known)}
    last = {name.rpartition("/")[2].lower(): name for name in reversed(known)}
    end = found.rpartition("/")[2]
    for word, options in ((found, whole), (end, last)):
        if likely := difflib.get_close_matches(word, options, n=1, cutoff=0.7):
            return f"; did you mean {options[likely[0]]!r}?"
    return ""


def mistyped(places: Places, tree: Any, folder: Path, local: bool = False) -> tuple[Problem, ...]:
    """A problem for every model of a recipe in `folder` that is nowhere, where one that is there is near.

    `local` leaves out what may be an id on the hub, which a job may download.
    """
    asked = [(where, text) for where, text in _models(tree, "") if _missing(places, text, folder, local)]
    if not asked:
        return ()
    models = shelf(places, details=False).models
    names = [written(one.path, folder) for one in models] + [one.name for one in hub.cached(details=False)]
    hints = ((where, text, near(text, names)) for where, text in asked)
    return tuple(
        Problem(Code.INPUT, where, f"{where}: {text}: no such model{hint}") for where, text, hint in hints if hint
    )


def nearer(found: Iterable[Problem], problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Problems, with those that say which model is near in the place of what was said of the same inputs."""
    found = tuple(found)
    inputs = {one.where for one in found}
    return (*found, *(one for one in problems if one.where not in inputs or one.code is not Code.INPUT))


def _models(tree: Any, where: str) -> Iterator[tuple[str, str]]:
    """(input, model) of the texts that stand for models."""
    if isinstance(tree, str):
        yield where, tree
    elif isinstance(tree, Mapping):
        for key in _MODELS:
            inner = tree.get(key)
            if key == "models" and isinstance(inner, Mapping):
                for name, ref in inner.items():
                    yield from _models(ref, where or str(name))
            else:
                yield from _models(inner, where or key)


def _missing(places: Places, text: str, folder: Path, local: bool) -> bool:
    """Whether a text is the name of a model that is neither in the folders nor in the hub's cache."""
    path = folder / text
    if not text.strip() or "\0" in text or "://" in text or not places.holds(path):
        return False
    try:
        parent = (folder / text.partition("/")[0]).is_dir()
        return not path.exists() and not hub.holds(text) and not (local and looks_like_hub_id(text) and not parent)
    except OSError:
        return False
