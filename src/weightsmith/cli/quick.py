"""What makes the imports of a short run cheaper, in a process that is weightsmith's own.

A merge of two small models is nearly all imports, and much of those prepares what such a run never uses: docstrings of
NumPy, classes that describe types, a handful of methods for every dataclass.  All of it is still there, made when it is
first asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import typing
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["Later", "StandIn", "methods_later", "stand_ins"]


_RARE = (
    "ast",
    "difflib",
    "glob",
    "hashlib",
    "ipaddress",
    "pickle",
    "secrets",
    "shutil",
    "tempfile",
    "textwrap",
    "tokenize",
)
"""Modules of Python that others import at their head, for functions that a merge does not call."""


class StandIn(ModuleType):
    """Stands for a module that others import and rarely use: what they take from it at once; the rest loads it."""

    def __init__(self, name: str, load: Callable[[str], ModuleType] = importlib.import_module, **taken: Any) -> None:
        super().__init__(name)
        self.__dict__.update(taken, _load=load, _taken=tuple(taken))
        sys.modules.setdefault(name, self)

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "__path__":  # which every `from ... import` asks for
            return _folders(self.__name__)
        if attribute in ("__file__", "__wrapped__"):  # introspection must not load it
            raise AttributeError(attribute)
        return getattr(self._real(), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self._real(), attribute, value)

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
            for name in self.__dict__.pop("_taken"):
                del self.__dict__[name]
        load: Callable[[str], ModuleType] = self.__dict__["_load"]
        return load(self.__name__)


def _folders(name: str) -> list[str]:
    """Where the modules of a package lie that is not loaded; AttributeError where it is a plain module."""
    parent, _, own = name.rpartition(".")
    found = [f"{folder}/{own}" for folder in (sys.modules[parent].__path__ if parent else ())]
    if not any(map(os.path.isdir, found)):
        raise AttributeError("__path__")
    return found


def stand_ins() -> None:
    """Put them in the place of modules that only describe: a third of NumPy's import, and half of pydantic's core."""
    for name in _RARE:
        StandIn(name)
    for name in ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars"):
        StandIn(name)
    StandIn("numpy._typing", NDArray=list)
    StandIn("pydantic_core.core_schema", _plainly)


def _plainly(name: str) -> ModuleType:
    """Import a module whose hundred typed dictionaries only a type checker reads: as plain ones."""
    home: Any = typing if sys.version_info >= (3, 12) else importlib.import_module("typing_extensions")
    kept, home.TypedDict = home.TypedDict, _PlainDict
    try:
        return importlib.import_module(name)
    finally:
        home.TypedDict = kept


class _PlainDict(dict[str, Any]):
    def __init_subclass__(cls, total: bool = True) -> None:
        super().__init_subclass__()


class Later:
    """A method of a dataclass that is compiled when it is first looked up: most of them never are."""

    def __init__(self, name: str, make: Callable[[], FunctionType]) -> None:
        self.__name__ = name
        self._make = make
        self._made: FunctionType | None = None

    def __get__(self, instance: object, owner: type) -> Any:
        made = self._made or self._compiled()
        for cls in owner.__mro__:
            for name in [name for name, value in cls.__dict__.items() if value is self]:
                made.__qualname__ = f"{cls.__qualname__}.{name}"
                setattr(cls, name, made)
        return made.__get__(instance, owner)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self._made or self._compiled())(*arguments, **named)

    def _compiled(self) -> FunctionType:
        self._made = self._make()
        return self._made


def methods_later() -> None:
    """Have `dataclasses` compile every method when it is first used, where this Python compiles them one by one."""
    create: Any = getattr(dataclasses, "_create_fn", None)  # until 3.12; 3.13 compiles all of a class at once
    if create is not None:
        patched: Any = dataclasses
        patched._create_fn = lambda name, *given, **named: Later(name, lambda: create(name, *given, **named))
