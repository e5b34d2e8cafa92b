"""Genes: single values that a search chooses, each between bounds or out of a list."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LINKS", "Gene", "Point"]

Point = Mapping[str, Any]
"""Gene -> its value, as JSON has it."""

LINKS = ("identity", "abs", "share", "free")
"""What a recipe has of a gene's value: itself, its size, its size up to 1; free: itself, and no bounds hold it."""


@dataclass(frozen=True)
class Gene:
    """One value.

    low, high  bounds of a number; values: in place of them, what is chosen from
    log        drawn evenly on the scale of logarithms; integer: whole numbers
    start      where a search begins; default: the middle
    link       see `LINKS`: mergekit's genes have no bounds, and their sizes count
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    values: tuple[Any, ...] = ()
    log: bool = False
    integer: bool = False
    start: Any = None
    link: str = "identity"

    def at(self, share: float) -> Any:
        """The value at 0..1 of the range."""
        share = min(max(share, 0.0), 1.0)
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.integer:
            whole = int(self.low) + int(share * (int(self.high) - int(self.low) + 1))
            return min(whole, int(self.high))
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return min(max(math.exp(low + share * (high - low)), self.low), self.high)
        return self.low + share * (self.high - self.low)

    def share(self, value: Any) -> float:
        """Where in 0..1 a value lies: the middle of its part where there are few."""
        if self.values:
            return (self.values.index(value) + 0.5) / len(self.values)
        if self.integer:
            return (int(value) - int(self.low) + 0.5) / (int(self.high) - int(self.low) + 1)
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (float(value) - self.low) / ((self.high - self.low) or 1.0)

    @property
    def begin(self) -> Any:
        """Where a search begins."""
        return self.at(0.5) if self.start is None else self.start

    def grid(self, steps: int) -> list[Any]:
        """All values of a list or of few whole numbers; else so many, evenly, both ends included."""
        if self.values:
            return list(self.values)
        if self.integer and self.high - self.low < steps:
            return list(range(int(self.low), int(self.high) + 1))
        if steps == 1:
            return [self.begin]
        found = [self.at(i / (steps - 1)) for i in range(steps)]
        return list(dict.fromkeys(found))

    def linked(self, value: Any) -> Any:
        """What the recipe has."""
        if self.link in ("identity", "free"):
            return value
        return abs(value) if self.link == "abs" else min(abs(value), 1.0)
