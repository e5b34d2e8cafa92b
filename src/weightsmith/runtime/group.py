"""The states of layers that share a basis: exact first tokens, compressed ones, and an exact recent tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import PlanError
from weightsmith.runtime.binding import Rotate, opposite
from weightsmith.runtime.reading import Reading
from weightsmith.runtime.shared import LowRank, Rule, Shared, Slerp

__all__ = ["Group", "Policy", "Turns"]


@dataclass(frozen=True)
class Policy:
    """When tokens are compressed, and how.

    keys, values  see `Rule`
    recent, sink  last and first tokens that stay exact
    least         fewer tokens are not compressed
    every         new tokens beyond `recent` that are waited for before the next time
    slerp         MiniCache in place of a low-rank basis
    """

    keys: Rule
    values: Rule
    recent: int
    sink: int
    least: int
    every: int
    slerp: bool = False


class Turns:
    """Cosines and sines of all tokens so far, [batch or 1, tokens, width], for all layers together."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, ...] | None = None  # with room for more
        self.tokens = 0

    def add(self, cos: Tensor, sin: Tensor) -> None:
        """The tokens of one forward pass; rows of a batch that are equal are held once."""
        pair, new = (cos, sin), cos.shape[1]
        if all(torch.equal(x, x[:1].expand_as(x)) for x in pair):
            pair = (cos[:1], sin[:1])
        held = self._held
        batch = max(pair[0].shape[0], 1 if held is None else held[0].shape[0])
        if held is None or held[0].shape[1] < self.tokens + new or held[0].shape[0] < batch:
            room = -(-(self.tokens + new) // 256) * 256
            grown = tuple(x.new_zeros(batch, room, x.shape[2]) for x in pair)
            for x, old in zip(grown, held or (), strict=False):
                x[:, : self.tokens] = old[:, : self.tokens]
            self._held = held = grown
        for x, own in zip(held, pair, strict=True):
            x[:, self.tokens : self.tokens + new] = own
        self.tokens += new

    def slice(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        assert self._held is not None
        cos, sin = self._held
        return cos[:, low:high], sin[:, low:high]

    def clear(self) -> None:
        self._held, self.tokens = None, 0

    def take(self, index: Tensor) -> None:
        if self._held is not None and self._held[0].shape[0] > 1:
            self._held = tuple(x.index_select(0, index) for x in self._held)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._held or ())


class Group:
    """Layers that are compressed together.

    layers  their numbers in the model; rotate: None where keys are not rotated
    """

    def __init__(self, layers: Sequence[int], policy: Policy, turns: Turns, rotate: Rotate | None) -> None:
        self.layers, self.policy = tuple(layers), policy
        self._turns, self._rotate = turns, rotate
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.keys: Shared | None = None
        self.values: Shared | None = None
        # Per layer (keys, values), [batch, heads, tokens, width] each.
        self._first: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        self._middle: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.layers)
        self._last: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        self._wait = self.policy.least

    def length(self, place: int) -> int:
        """Tokens held of a layer."""
        first, last = self._first[place], self._last[place]
        return sum(pair[0].shape[2] for pair in (first, last) if pair is not None) + self._compressed

    @property
    def _compressed(self) -> int:
        part = self.keys or self.values
        return part.tokens if part is not None else 0

    @property
    def batch(self) -> int:
        """Sequences held."""
        return next((pair[0].shape[0] for pair in self._last if pair is not None), 0)

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the same tokens in an exact cache."""
        pairs = [(place, pair) for place, pair in enumerate(self._last) if pair is not None]
        return sum(
            x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() * self.length(place)
            for place, pair in pairs
            for x in pair
        )

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of factors, and of exact states."""
        exact = [x for pairs in (self._first, self._last) for pair in pairs if pair is not None for x in pair]
        exact += [x for pair in self._middle for x in pair if x is not None]
        shared = [part for part in (self.keys, self.values) if part is not None]
        return {"factors": sum(s.nbytes for s in shared), "exact": sum(x.nbytes for x in exact)}

    def add(self, place: int, keys: Tensor, values: Tensor, mask: Tensor | None) -> Reading | tuple[Tensor, Tensor]:
        """Take a layer's new states, [batch, heads, tokens, width]; what its attention reads in this pass.

        mask  [batch, tokens of all layers so far] bool, None without padding

        Tokens are compressed when all layers hold the same: before the first layer takes a single token; and after the
        last one took several, so that a long prompt is held exactly by one group at a time.
        """
        single = keys.shape[2] == 1
        if place == 0 and single and self._due(self.policy.every):
            self._compress(mask)
        last = self._last[place]
        pair = (keys, values) if last is None else (torch.cat([last[0], keys], 2), torch.cat([last[1], values], 2))
        self._last[place] = pair
        found = self._reading(place)
        if place == len(self.layers) - 1 and not single and self._due(0):
            self._compress(mask)
        return found

    def take(self, index: Tensor) -> None:
        """Choose sequences of the batch, in this order."""
        self.keys = None if self.keys is None else self.keys.taken(index)
        self.values = None if self.values is None else self.values.taken(index)

        def chosen(x: Tensor) -> Tensor:
            return x.index_select(0, index)

        for pairs in (self._first, self._last):
            for place, pair in enumerate(pairs):
                if pair is not None:
                    pairs[place] = (chosen(pair[0]), chosen(pair[1]))
        self._middle = [(None if k is None else chosen(k), None if v is None else chosen(v)) for k, v in self._middle]

    def _reading(self, place: int) -> Reading | tuple[Tensor, Tensor]:
        pair, start = self._last[place], self._start
        assert pair is not None
        if not self._compressed:
            return pair

        def turn(rows: Tensor, low: int, high: int) -> Tensor:
            if self._rotate is None:
                return rows
            return self._rotate(rows, *self._turns.slice(start + low, start + high))

        return Reading(
            layer=place,
            heads=pair[0].shape[1],
            first=self._first[place],
            last=pair,
            keys=self.keys,
            values=self.values,
            middle=self._middle[place],
            turn=turn,
        )

    @property
    def _start(self) -> int:
        return self.policy.sink if self._compressed else 0

    def _due(self, more: int) -> bool:
        last = self._last[0]
        if last is None:
            return False
        free = last[0].shape[2] - self.policy.recent - (0 if self._compressed else self.policy.sink)
        return free >= max(self._wait, more, 1)

    def _compress(self, mask: Tensor | None) -> None:
        """Move all but the recent tokens of the tail into the compressed part; nothing where that saves nothing."""
        pairs = [pair for pair in self._last if pair is not None]
        _, heads, length, _ = pairs[0][0].shape
        sink = 0 if self._compressed else self.policy.sink
        low, high = sink, length - self.policy.recent
        start = self._start + self._compressed + sink  # the first of them among all tokens
        seen = None if mask is None else mask[:, start : start + high - low].bool()
        if mask is not None and self.policy.sink and not bool(mask[:, : self.policy.sink].all()):
            raise PlanError([f"sink = {self.policy.sink} keeps the first tokens, which are padding here; use sink=0"])
        cut = [tuple(x[:, :, low:high] for x in pair) for pair in pairs]
        keys = [self._unturned(k, start) for k, _ in cut]
        rules = (self.policy.keys, self.policy.values)
        flat = ([_flat(k, seen) for k in keys], [_flat(v, seen) for _, v in cut])
        made: list[Shared | None] = []
        for old, states, rule in zip((self.keys, self.values), flat, rules, strict=True):
            made.append(None if rule.idle else self._made(old, states, rule, heads))
        if any(one is None and not rule.idle for one, rule in zip(made, rules, strict=True)):
            self._wait = max(2 * (high - low), 1)  # it saves nothing yet
            return
        self.keys, self.values = made
        self._wait = max(self.policy.every, 1)
        for place, (k, v) in enumerate(pairs):
            if sink:
                self._first[place] = (k[:, :, :sink].clone(), v[:, :, :sink].clone())
            middle = self._middle[place]
            self._middle[place] = (
                None if self.keys else _joined(middle[0], cut[place][0]),
                None if self.values else _joined(middle[1], cut[place][1]),
            )
            # A copy: a slice would keep the memory of all.
            self._last[place] = (k[:, :, high:].clone(), v[:, :, high:].clone())

    def _made(self, old: Shared | None, states: Sequence[Tensor], rule: Rule, heads: int) -> Shared | None:
        if old is not None:
            return old.grown(states, rule)
        return Slerp.of(states, heads) if self.policy.slerp else LowRank.of(states, rule)

    def _unturned(self, keys: Tensor, start: int) -> Tensor:
        """Keys before their rotation, float32 where there is one."""
        if self._rotate is None or self.policy.keys.idle:
            return keys
        turned = self._rotate(keys.float(), *opposite(*self._turns.slice(start, start + keys.shape[2])))
        return turned.to(keys.dtype)


def _flat(states: Tensor, seen: Tensor | None) -> Tensor:
    """[batch, heads, tokens, width] -> [batch, tokens, heads * width], zero at padding."""
    rows = states.transpose(1, 2).flatten(2)
    return rows if seen is None else rows * seen[:, :, None].to(rows.dtype)


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new.clone() if old is None else torch.cat([old, new], 2)
