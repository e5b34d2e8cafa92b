"""Attention over states of which most are compressed: a tile of keys is rebuilt at a time, values are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.runtime.shared import TILE, Shared

__all__ = ["MANY", "Reading", "attend"]

MANY = 16
"""Queries from which on a layer's states are rebuilt at once: tiles would be rebuilt for every query again."""


@dataclass(eq=False)
class Reading:
    """One layer's states at one moment, in the order of the tokens: exact first ones, compressed ones, exact last ones.

    layer          its place in the group
    first, last    (keys, values), each [batch, heads, tokens, width], keys rotated
    keys, values   compressed; None where they are exact in `middle`
    turn           rotates a tile: ([batch, heads, tokens, width], low, high) -> the same
    """

    layer: int
    heads: int
    first: tuple[Tensor, Tensor] | None
    last: tuple[Tensor, Tensor]
    keys: Shared | None
    values: Shared | None
    middle: tuple[Tensor | None, Tensor | None]
    turn: Callable[[Tensor, int, int], Tensor]
    done: bool = False

    @property
    def compressed(self) -> int:
        """Tokens between the first and the last."""
        part: Shared | None = self.keys or self.values
        return part.tokens if part is not None else 0

    def tile(self, low: int, high: int) -> Tensor:
        """Rotated keys of compressed tokens: [batch, heads, high - low, width]."""
        if self.keys is None:
            assert self.middle[0] is not None
            return self.middle[0][:, :, low:high]
        return self.turn(self._split(self.keys.rows(self.layer, low, high)), low, high)

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values, rebuilt: [batch, heads, tokens, width] each."""
        count = self.compressed
        values = self.middle[1]
        if values is None:
            assert self.values is not None
            values = self._split(self.values.rows(self.layer, 0, count))
        firsts = [] if self.first is None else [self.first]
        keys = torch.cat([*(k for k, _ in firsts), self.tile(0, count), self.last[0]], 2)
        return keys, torch.cat([*(v for _, v in firsts), values, self.last[1]], 2)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], self.heads, -1).transpose(1, 2)


def attend(reading: Reading, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale Q K^T + mask) V: query [batch, query heads, queries, width] -> the same shape, with V's width.

    mask  [batch, 1 or query heads, queries, tokens], bool (True: seen) or added
    """
    reading.done = True
    batch, heads, queries, width = query.shape
    # Queries that share a head of keys lie beside each other: [batch, key heads, group * queries, width].
    q = query.reshape(batch, reading.heads, -1, width)
    firsts = [] if reading.first is None else [reading.first]
    start, count = sum(k.shape[2] for k, _ in firsts), reading.compressed
    scores = [q @ k.mT for k, _ in firsts]
    scores += [q @ reading.tile(low, min(low + TILE, count)).mT for low in range(0, count, TILE)]
    scores.append(q @ reading.last[0].mT)
    found = torch.cat(scores, 3).float() * scale
    if mask is not None:
        wide = found.view(batch, reading.heads, -1, queries, found.shape[3])
        own = mask.view(batch, -1, 1, *mask.shape[2:]) if mask.shape[1] == 1 else mask.view(
            batch, reading.heads, -1, *mask.shape[2:])  # fmt: skip
        wide = wide.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else wide + own
        found = wide.view(found.shape)
    weights = found.softmax(3).nan_to_num(0).to(query.dtype)
    out = weights[..., start + count :] @ reading.last[1]
    for _, v in firsts:
        out = out + weights[..., :start] @ v
    middle = weights[..., start : start + count]
    if reading.values is not None:
        out = out + reading.values.weighted(reading.layer, middle, reading.heads)
    elif reading.middle[1] is not None:
        out = out + middle @ reading.middle[1]
    return out.reshape(batch, heads, queries, -1)
