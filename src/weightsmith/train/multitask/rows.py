"""Rows of tokens for causal language models: what all begin with runs once, and several examples fit in a row."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError

__all__ = ["Packed", "Shared", "bins", "common", "packed", "refuse_packing"]


@dataclass(frozen=True, eq=False)
class Shared:
    """Keys and values of the tokens (and vectors of a prompt) that begin every row.

    skip     tokens of a row that are in it
    before   positions that are in it: vectors, then tokens
    """

    cache: Any
    skip: int
    before: int

    def options(self, mask: Tensor) -> dict[str, Any]:
        """How a model goes on from it with rows whose other tokens are at mask [batch, tokens]."""
        cache = copy.deepcopy(self.cache)  # a model appends to what it is given
        cache.batch_repeat_interleave(len(mask))
        ones = torch.ones(len(mask), self.before, dtype=mask.dtype, device=mask.device)
        return {"past_key_values": cache, "attention_mask": torch.cat([ones, mask], 1)}


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; at least the last token of each stays outside."""
    least = min(map(len, rows)) - 1
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(row[:least] for row in rows), strict=True))
    return sum(1 for _ in alike)


# --- packing --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """Several rows behind each other in one, in which no token sees another row's.

    ids, positions  [bins, tokens]; positions begin at 0 with every row
    mask            [bins, 1, tokens, tokens] float32: 0 where a token may look, the least number elsewhere
    places          of each row, in their order: its bin and where it begins
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    places: Sequence[tuple[int, int]]

    def unpacked(self, found: Tensor, lengths: Sequence[int]) -> Tensor:
        """Outputs [bins, tokens, ...] as rows [rows, longest, ...], 0 behind their ends."""
        rows = [found[b, start : start + n] for (b, start), n in zip(self.places, lengths, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of rows that go into one, the longest first, each into the first with room for it."""
    found: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, left in enumerate(free) if left >= lengths[row]), len(free))
        if at == len(free):
            found.append([])
            free.append(max(room, lengths[row]))
        found[at].append(row)
        free[at] -= lengths[row]
    return found


def packed(rows: Sequence[Sequence[int]], room: int) -> Packed:
    """Pack token rows into rows of at most `room` tokens (a longer one stands alone)."""
    groups = bins([len(row) for row in rows], room)
    width = max(sum(len(rows[i]) for i in group) for group in groups)
    ids, owner = torch.zeros(len(groups), width, dtype=torch.int64), torch.full((len(groups), width), -1)
    positions = torch.zeros_like(ids)
    places = [(0, 0)] * len(rows)
    for b, group in enumerate(groups):
        start = 0
        for i in group:
            stop = start + len(rows[i])
            ids[b, start:stop], owner[b, start:stop] = torch.tensor([*rows[i]]), i
            positions[b, start:stop] = torch.arange(stop - start)
            places[i], start = (b, start), stop
    seen = (owner[:, :, None] == owner[:, None]) & torch.ones(width, width, dtype=torch.bool).tril()
    least = torch.finfo(torch.float32).min
    return Packed(ids, positions, torch.zeros(seen.shape).masked_fill_(~seen, least)[:, None], places)


def refuse_packing(module: Any, label: str) -> None:
    """RecipeError for a model that takes no positions, or whose layers do not all look at everything."""
    kinds = set(getattr(getattr(module, "config", None), "layer_types", None) or ())
    if "position_ids" not in inspect.signature(module.forward).parameters or kinds - {"full_attention"}:
        raise RecipeError(f"{label}: its layers cannot keep packed examples apart; leave packing out")
