"""What lives in a running model: torch modules and cache classes, no server.

    XkvCache    a cache for transformers that holds one low-rank basis per group of layers
    MiniCache   its baseline: one direction per pair of layers, and norms
    Routed      a compressed folder of twin experts as one model with low-rank branches per sample

A part is imported, and torch with it, when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MiniCache", "Routed", "Router", "XkvCache", "compare", "release", "train_router"]

_PLACES = {
    "MiniCache": "cache",
    "Routed": "routed",
    "Router": "router",
    "XkvCache": "cache",
    "compare": "routed",
    "release": "binding",
    "train_router": "router",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'weightsmith.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"weightsmith.runtime.{_PLACES[name]}"), name)
