"""Objectives and presets by name: one file each, found by themselves; plug-ins by the entry point weightsmith.tune."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from weightsmith.core.errors import RecipeError, did_you_mean

__all__ = ["Named", "lines", "make", "named"]

N = TypeVar("N", bound="Named")

_FOLDERS = ("weightsmith.tune.objectives", "weightsmith.tune.presets")


@dataclass(frozen=True)
class Named:
    """A frozen value that a file names; its fields are its options."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.name = name

    @classmethod
    def help(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


_KINDS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    (str, str, "a text"),
    (tuple, (list, tuple), "a list"),
    (Mapping, Mapping, "a mapping"),
)


def _unlike(value: Any, hint: Any) -> str:
    """What a value should be, in words, if it is something else; '' otherwise."""
    kind = get_origin(hint) or hint
    for declared, fits, words in _KINDS:
        if kind is declared:
            good = isinstance(value, fits) and (kind is bool or not isinstance(value, bool))
            if good and kind is tuple and get_args(hint):
                return next((inner for one in value if (inner := _unlike(one, get_args(hint)[0]))), "")
            return "" if good else words
    return ""


@cache
def _loaded() -> None:
    from importlib.metadata import entry_points

    for folder in _FOLDERS:
        for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
            importlib.import_module(f"{folder}.{module.name}")
    for entry in entry_points(group="weightsmith.tune"):
        entry.load()


def named(kind: type[N]) -> Mapping[str, type[N]]:
    """Every objective (or preset) by name."""
    _loaded()
    found: dict[str, type[N]] = {}
    left: list[type[N]] = [kind]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.name:
            found[cls.name] = cls
    return dict(sorted(found.items()))


def lines(folder: str) -> Mapping[str, str]:
    """Name -> first line of the docstring, of the values in `folder` (presets, objectives).

    Read from the files: importing them loads torch, which a listing need not wait for.  Plug-ins are not among them.
    """
    found: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / folder).glob("*.py")):
        classes = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
        for node in classes:
            names = [
                word.value.value
                for word in node.keywords
                if word.arg == "name" and isinstance(word.value, ast.Constant)
            ]
            found |= {str(name): (ast.get_docstring(node) or "").split("\n")[0] for name in names}
    return dict(sorted(found.items()))


def make(kind: type[N], what: str, name: str, options: Mapping[str, Any]) -> N:
    """The value of a name with its options; RecipeError with the nearest name for what is unknown."""
    known = named(kind)
    if name not in known:
        raise RecipeError(f"unknown {what} {name!r}{did_you_mean(name, known)}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    hints = get_type_hints(known[name])
    wrong = []
    for option, value in options.items():
        if option not in fields:
            wrong.append(f"{what} {name}: unknown option {option!r}{did_you_mean(option, fields)}")
        elif problem := _unlike(value, hints[option]):
            wrong.append(f"{what} {name}: {option} should be {problem}, is {value!r}")
    if wrong:
        raise RecipeError(*wrong)
    return known[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
