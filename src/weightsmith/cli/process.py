"""Settings for a process that is weightsmith's own; a library must not make them for its host."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from types import ModuleType

__all__ = ["for_learning", "own_process"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # of mallopt(3)


def own_process() -> None:
    """Make them."""
    _without_plugins()
    # Imports make a hundred thousand objects that stay: there is no garbage to look for among them.
    gc.set_threshold(100_000, 10, 10)
    _keep_freed_memory()


def _without_plugins() -> None:
    """Have pydantic look for no plug-ins: it would search all installed packages, and run what it finds.

    The variable says so; its module that then finds none is a twentieth of a short run to import, and stays out.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if os.environ["PYDANTIC_DISABLE_PLUGINS"] == "__all__":
        loader = ModuleType("pydantic.plugin._loader")
        loader.get_plugins = tuple  # type: ignore[attr-defined]
        sys.modules.setdefault(loader.__name__, loader)


def _keep_freed_memory() -> None:
    """Have the allocator use freed blocks again instead of giving them back to the system.

    A merge takes and frees buffers of a few hundred KB thousands of times; fresh ones cost a page fault for every
    4 KB, more than the arithmetic.  Only glibc knows the settings; elsewhere nothing happens.
    """
    _set(_ARENA_MAX, 1)  # one pool for all threads: what one frees the next can use
    _set(_MMAP_THRESHOLD, 8 << 20)  # whole matrices go back to the system: one pool of all sizes has holes
    _set(_TRIM_THRESHOLD, 1 << 30)
    _set(_TOP_PAD, 16 << 20)


def for_learning() -> None:
    """Have activations, hundreds of a few MB each, go back to the system: in the pool they leave holes.

    Of a model of 108 million weights the peak was 1.74 GB, and 2.05 GB with the settings for merging.
    """
    _set(_MMAP_THRESHOLD, 1 << 20)
    _set(_TRIM_THRESHOLD, 64 << 20)


def _set(what: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(what, value)
