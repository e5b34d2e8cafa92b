"""What a case is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .payload import Part

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """One output: its name, and what makes its parts in a folder of its own.

    plain: whether to make it without the kernels too; not where they have no part in it, and it takes long.
    """

    name: str
    make: Callable[[Path], Sequence[Part]]
    plain: bool = True
