"""A model with units of its layers multiplied by small matrices: see `core.turn`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.lazy import torch
from weightsmith.core.turn import Turn, by_tensor, turned
from weightsmith.io.read.source import Block, Source
from weightsmith.io.read.views import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TurnedSource"]

_PRECISE = ("float32", "float64")


class TurnedSource(View):
    """A source with some of its tensors turned, calculated block by block as it is read.

    Tensors of float32 and float64 are calculated, and shown, in float64.  Of shorter ones the matrices are in float32:
    its rounding is 2^13 times finer than that of the cast that follows.

    told  what tells this view from another of the same source; never what the matrices are
    """

    shows = "turned"

    def __init__(self, source: Source, turns: Iterable[Turn], told: Mapping[str, Any]) -> None:
        super().__init__(source)
        self.turns, self.told = by_tensor(turns), dict(told)
        for name, own in self.turns.items():
            shape = self.key(name).shape
            if any(turn.axis >= len(shape) or turn.stop > shape[turn.axis] for turn in own):
                raise SourceError(f"{source}: {name} is {list(shape)}, which is not what its layout says")

    def computes(self, name: str) -> bool:
        return self.key(name).name in self.turns or super().computes(name)

    def read_cost(self, name: str) -> float:
        return super().read_cost(name) + (6.0 if self.key(name).name in self.turns else 0.0)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        own = self.turns.get(key.name)
        if own is None:
            return super().block(name, low, high, into)
        low, high, _ = slice(low, high).indices(key.rows)
        first, last = low, max(low, high)
        for turn in (turn for turn in own if turn.axis == 0):
            first, last = turn.around(first, last)
        value: Tensor = self.source.read(key.name, first, last)
        value = value.to(torch.float64 if key.dtype in _PRECISE else torch.float32, copy=True)
        for turn in own:
            turned(value, turn, first if turn.axis == 0 else 0)
        return value[low - first : high - first] if value.ndim else value

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.shows, "source": self.source.fingerprint(), **self.told}
