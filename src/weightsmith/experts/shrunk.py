"""A mixture with fewer experts as a source: every tensor made of the larger one's when it is asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.experts.clusters import Grouping
from weightsmith.experts.grouping import unit_order
from weightsmith.experts.stacks import Stack
from weightsmith.io.read.source import Bits, Block, Source
from weightsmith.io.read.views import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Layer", "ShrunkSource"]

_KEPT = 2  # merged experts kept: a reader goes through one tensor block by block


@dataclass(frozen=True)
class Layer:
    """One layer's experts and what becomes of them.

    mean     rows of the router are averaged; else the leader's stays
    rank     of the subspace that a merged expert's matrices are projected on; None: they stay as they are
    moments  [E, d, d] second moments of what each expert reads, which the subspace of gate and up then counts by
    """

    stack: Stack
    grouping: Grouping
    mean: bool = True
    rank: int | None = None
    moments: str = ""

    @property
    def merges(self) -> bool:
        return self.grouping.merges

    @property
    def aligned(self) -> bool:
        """Whether there is anything to align."""
        return self.merges


@dataclass(frozen=True)
class _Made:
    """Where a tensor comes from: `word` of the new expert `number`, or all of them; word '': rows of a router's."""

    layer: Layer
    word: str
    name: str
    number: int | None = None


@dataclass(frozen=True)
class _Cache:
    """The tensors made last, for readers that take them block by block."""

    kept: OrderedDict[tuple[str, int], Tensor] = field(default_factory=OrderedDict)
    lock: Any = field(default_factory=threading.Lock)


class ShrunkSource(View):
    """The tensors of `source`, with the experts of `layers` replaced; those in `dropped` are not there.

    orders  (experts' module, expert) -> the order of its hidden units that fits its leader's; filled in before reading
    stats   source of the second moments, where a layer asks for them
    """

    shows = "shrunk"

    def __init__(
        self, source: Source, layers: Collection[Layer], dropped: Collection[str] = (), stats: Source | None = None
    ) -> None:
        super().__init__(source, origin=replace(source.origin, label=f"{source}, with fewer experts"))
        self.layers, self.stats = {layer.stack.name: layer for layer in layers}, stats
        self.orders: dict[tuple[str, int], np.ndarray] = {}
        old: dict[str, Layer] = {n: layer for layer in layers for n in (*layer.stack.tensors(), *layer.stack.router)}
        gone, done = set(dropped), set[str]()
        self._made: dict[str, _Made] = {}
        keys: dict[str, Key] = {}
        for name, key in source.keys.items():
            if name in gone:
                continue
            if (layer := old.get(name)) is None:
                keys[name] = key
            elif name in layer.stack.router:
                keys[name] = Key(name, (layer.grouping.count, *key.shape[1:]), key.dtype)
                self._made[name] = _Made(layer, "", name)
            elif layer.stack.name not in done:
                done.add(layer.stack.name)
                keys |= self._experts(layer)
        self.keys = keys
        self.aliases = {a: n for a, n in source.aliases.items() if a not in gone and n in keys}
        self._cache = _Cache()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Cache()

    def _experts(self, layer: Layer) -> dict[str, Key]:
        """Keys of a layer's new experts."""
        found: dict[str, Key] = {}
        stack, count = layer.stack, layer.grouping.count
        for number in [None] if stack.fused else range(count):
            for word in stack.parts:
                key = stack.key(self.source, word)
                name = stack.of(number or 0, word)
                found[name] = Key(name, (count, *key.shape) if stack.fused else key.shape, key.dtype)
                self._made[name] = _Made(layer, word, name, number)
        return found

    # -- what a source says and gives

    def story(self, name: str) -> str:
        """How a tensor is made, for the manifest."""
        made = self._made.get(name)
        if made is None:
            return "copied"
        if not made.layer.merges or (made.word and made.number is not None and self._single(made.layer, made.number)):
            return "kept" if made.word else "rows kept"
        return "merged" if made.word else "rows averaged" if made.layer.mean else "rows kept"

    def own(self, name: str) -> tuple[Source, str]:
        name = self.key(name).name
        made = self._made.get(name)
        if made is None:
            return self.source, name
        leader = made.layer.grouping.leaders[made.number or 0]
        return self.source, made.layer.stack.of(leader, made.word) if made.word else name

    def computes(self, name: str) -> bool:
        source, own = self.own(name)
        made = self._made.get(self.key(name).name)
        if source.computes(own) or made is None:
            return source.computes(own)
        if not made.word:
            return made.layer.merges and made.layer.mean
        if made.number is None:
            return made.layer.merges
        return not self._single(made.layer, made.number)

    def read_cost(self, name: str) -> float:
        # A member as it is stored and in float32, and the sum beside the copy that is handed over.
        return super().read_cost(name) + (4.0 if self.computes(name) else 1.0)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        made = self._made.get(key.name)
        if made is None:
            return super().block(name, low, high, into)
        if not made.word:
            return self._router(made, key, low, high)
        if made.number is None:
            numbers = range(*slice(low, high).indices(key.rows))
            if self.computes(name):
                rows = [self._expert(made, number) for number in numbers]
                return torch.stack(rows) if rows else torch.empty((0, *key.shape[1:]))
            leaders = [made.layer.grouping.leaders[number] for number in numbers]
            return _rows(self.source, key, leaders)
        if self.computes(name):
            return self._expert(made, made.number)[low:high]
        return self.source.block(self.own(name)[1], low, high, into)

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint()

    # -- making

    def _single(self, layer: Layer, number: int) -> bool:
        return len(layer.grouping.members(number)) == 1

    def _router(self, made: _Made, key: Key, low: int, high: int | None) -> Block:
        """Rows of a router: small, and read whole."""
        grouping = made.layer.grouping
        if not self.computes(key.name):
            return _rows(self.source, key, list(grouping.leaders)[low:high])
        whole = self.source.read(key.name)
        wide = whole.double()
        out = []
        for number in range(grouping.count):
            members = grouping.members(number) if made.layer.mean else [grouping.leaders[number]]
            parts = torch.tensor([grouping.shares[e] for e in members], dtype=torch.float64)
            out.append((parts / parts.sum()) @ wide[members].reshape(len(members), -1))
        return torch.stack(out).reshape(key.shape).float()[low:high]

    def _expert(self, made: _Made, number: int) -> Tensor:
        """A word of a new expert, whole, in float32 where it is merged."""
        place = (made.name, number)
        with self._cache.lock:
            if (known := self._cache.kept.get(place)) is not None:
                return known
        value = self._merged(made, number)
        with self._cache.lock:
            self._cache.kept[place] = value
            while len(self._cache.kept) > _KEPT:
                self._cache.kept.popitem(last=False)
        return value

    def _merged(self, made: _Made, number: int) -> Tensor:
        stack, grouping = made.layer.stack, made.layer.grouping
        members = grouping.members(number)
        if len(members) == 1:
            return stack.read(self.source, members[0], made.word).float()
        total: Tensor | None = None
        for expert in members:
            value = self._ordered(stack, expert, made.word).float()
            share = grouping.shares[expert]
            total = value * share if total is None else total.add_(value, alpha=share)
        assert total is not None
        return total if made.layer.rank is None else self._projected(made, members, total)

    def _ordered(self, stack: Stack, expert: int, word: str) -> Tensor:
        value = stack.read(self.source, expert, word)
        order = self.orders.get((stack.name, expert))
        return value if order is None else stack.parts[word].ordered(value, torch.from_numpy(order))

    def _projected(self, made: _Made, members: list[int], mean: Tensor) -> Tensor:
        """The mean within the span of the leading left singular vectors of all members side by side.

        U_r U_r^T (sum_e f_e W_e), U_r from sum_e W_e C W_e^T: what Sub-MoE's union decomposition comes to.  C is the
        second moment of what gate and up read, where it is known, else the identity.
        """
        stack, rank, part = made.layer.stack, made.layer.rank, made.layer.stack.parts[made.word]
        assert rank is not None
        if mean.ndim != 2:
            return mean
        inputs = None
        if self.stats is not None and not made.word.startswith(("down_proj", "w2")):
            moments = [self.stats.read(made.layer.moments, e, e + 1)[0].double() for e in members]
            inputs = torch.stack(moments).mean(0)
        sums: list[Tensor] = []
        for expert in members:
            for at, matrix in enumerate(part.matrices(self._ordered(stack, expert, made.word).double())):
                square = matrix @ (matrix.T if inputs is None else inputs @ matrix.T)
                sums[at : at + 1] = [sums[at] + square if at < len(sums) else square]
        out = []
        for square, matrix in zip(sums, part.matrices(mean), strict=True):
            leading = torch.linalg.eigh(square).eigenvectors[:, -rank:].float()
            out.append(leading @ (leading.T @ matrix))
        return part.joined(out).contiguous()

    def align(self, layer: Layer) -> None:
        """Find the orders of a layer's hidden units: every member's to fit its leader's."""
        stack, grouping = layer.stack, layer.grouping
        for number in range(grouping.count):
            leader, *others = grouping.members(number)
            pattern = self._units(stack, leader) if others else []
            for expert in others:
                order = unit_order((pattern, ()), (self._units(stack, expert), ())).numpy()
                if (order != np.arange(len(order))).any():
                    self.orders[stack.name, expert] = order

    def _units(self, stack: Stack, expert: int) -> list[Tensor]:
        """All that belongs to an expert's hidden units: a row each."""
        rows = (part.units(stack.read(self.source, expert, word).float()) for word, part in stack.parts.items())
        return [found for found in rows if found is not None]


def _rows(source: Source, key: Key, chosen: list[int]) -> Block:
    """Rows of a stored tensor in any order."""
    if source.computes(key.name):
        taken = [source.read(key.name, row, row + 1) for row in chosen]
        return torch.cat(taken) if taken else torch.empty((0, *key.shape[1:]))
    bits = [source.bits(key.name, row, row + 1) for row in chosen]
    return Bits(np.concatenate(bits), key.dtype) if bits else Bits(source.bits(key.name, 0, 0), key.dtype)
