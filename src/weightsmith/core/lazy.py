"""Modules that cost seconds to import, imported at first use.

torch takes about two seconds to import; planning a merge, printing help and the fused
kernels need none of it.  Files that only *may* compute import torch from here.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["is_a", "torch"]


class _Lazy(ModuleType):
    """Stands for a module until an attribute of it is asked for."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # introspection (copy, inspect, doctest) must not trigger the import
            raise AttributeError(attribute)
        value = getattr(importlib.import_module(self.__name__), attribute)
        self.__dict__[attribute] = value
        return value


def is_a(value: object, module: str, name: str) -> bool:
    """Whether a value is of the class `name` of a module, which is not loaded for that: then nothing is of it."""
    loaded = sys.modules.get(f"weightsmith.{module}")
    return loaded is not None and isinstance(value, getattr(loaded, name))


if TYPE_CHECKING:
    import torch
else:
    torch = sys.modules.get("torch") or _Lazy("torch")
