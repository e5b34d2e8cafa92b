"""Views: sources that show others in another way, without copying them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key, layer_of
from weightsmith.io.read.layers import config_of, cut_config
from weightsmith.io.read.source import Block, Cut, Origin, Source

__all__ = ["JoinedSource", "RenamedSource", "SliceSource", "View", "block_counts", "slice_names"]


class View(Source):
    """Sources shown in another way.  Whatever a subclass does not change is as it is there.

    parts  what it is made of; config and companion files are the first one's, which is `source`
    """

    shows = ""
    """What its fingerprint calls it; '': its label."""

    def __init__(self, *parts: Source, origin: Origin | None = None) -> None:
        self.parts, self.source = parts, parts[0]
        self.origin = origin or self.source.origin.beside(*(part.origin for part in parts[1:]))
        self.keys, self.aliases = self.source.keys, self.source.aliases

    def own(self, name: str) -> tuple[Source, str]:
        """The part that holds a tensor, and its name there."""
        return self.source, self.key(name).name

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        source, name = self.own(name)
        return source.block(name, low, high, into)

    def computes(self, name: str) -> bool:
        source, name = self.own(name)
        return source.computes(name)

    def quick(self, name: str) -> bool:
        source, own = self.own(name)
        return not self.computes(name) and source.quick(own)

    def read_cost(self, name: str) -> float:
        source, name = self.own(name)
        return source.read_cost(name)

    def prepare(self) -> None:
        for part in self.parts:
            part.prepare()

    def fingerprint(self) -> dict[str, Any]:
        found: Any = [part.fingerprint() for part in self.parts]
        parts = {"source": found[0]} if len(found) == 1 else {"parts": found}
        return {"view": self.shows or self.origin.label, **parts}


class JoinedSource(View):
    """Tensors of some sources under new names: `names` maps each to (number of the part, its name there).

    Tensors that `names` leaves out are not there.  A tied name may be given new names like any other; it
    stays tied if the name that holds its data is there too, else it becomes a tensor of its own.
    """

    def __init__(
        self, parts: Sequence[Source], names: Mapping[str, tuple[int, str]], origin: Origin | None = None
    ) -> None:
        super().__init__(*parts, origin=origin)
        self.names = dict(names)
        keys: dict[str, Key] = {}
        aliases: dict[str, str] = {}
        shown: dict[tuple[int, str], str] = {}  # (part, the name that holds the data) -> the new name that lists it
        for new, (part, old) in sorted(names.items(), key=lambda item: item[1][1] in parts[item[1][0]].aliases):
            key = parts[part].key(old)
            first = shown.setdefault((part, key.name), new)
            if first == new:
                keys[new] = Key(new, key.shape, key.dtype)
            else:
                aliases[new] = first
        self.keys, self.aliases = {new: keys[new] for new in names if new in keys}, aliases

    def own(self, name: str) -> tuple[Source, str]:
        part, old = self.names[self.key(name).name]
        return self.parts[part], old


class RenamedSource(JoinedSource):
    """Some tensors of one source under other names: `names` maps each new name to the source's own."""

    def __init__(self, source: Source, names: Mapping[str, str], label: str | None = None) -> None:
        origin = source.origin if label is None else replace(source.origin, label=label)
        super().__init__((source,), {new: (0, old) for new, old in names.items()}, origin)


def block_counts(source: Source) -> dict[str, int]:
    """How many blocks each stack has: {'model.layers': 32}."""
    counts: dict[str, int] = {}
    for name in (*source.keys, *source.aliases):
        if (place := layer_of(name)) is not None:
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    return counts


def slice_names(source: Source, start: int, end: int, stack: str | None = None) -> dict[str, str]:
    """Map new names to old for blocks [start, end), renumbered from 0; tensors outside the blocks keep theirs.

    A model may have several stacks of blocks (vision and text): those with fewer than `end` blocks stay whole, as
    do all but `stack` where that is given.  Tensors that only the first block has stay with the first.
    """
    chosen: dict[str, str] = {}
    cut = _cut_stacks(source, start, end, stack)
    pinned = _pinned(source, cut)
    for name in (*source.keys, *source.aliases):
        place = layer_of(name)
        if place is None or place[0] not in cut or name in pinned:
            chosen[name] = name
        elif start <= place[1] < end:
            here, block = place
            chosen[f"{here}.{block - start}{name[len(f'{here}.{block}') :]}"] = name
    return chosen


def _cut_stacks(source: Source, start: int, end: int, stack: str | None) -> dict[str, int]:
    """The stacks that are cut, with the number of their blocks."""
    counts = block_counts(source)
    cut = {s: n for s, n in counts.items() if n >= end and stack in (None, s)}
    if not 0 <= start < end or not cut:
        have = ", ".join(f"{s} has {n}" for s, n in counts.items()) or "it has none"
        of = "" if stack is None else f" of {stack}"
        raise SourceError(f"{source}: cannot take blocks [{start}, {end}){of}: {have}")
    return cut


def _pinned(source: Source, stacks: Iterable[str]) -> frozenset[str]:
    """Tensors that the first block has beside all that every other block has, and no other block."""
    found: set[str] = set()
    for stack in stacks:
        blocks: dict[int, set[str]] = {}
        for name in (*source.keys, *source.aliases):
            place = layer_of(name)
            if place is not None and place[0] == stack:
                blocks.setdefault(place[1], set()).add(name[len(f"{stack}.{place[1]}") :])
        first, others = blocks.pop(0, set()), list(blocks.values())
        if others and all(other < first for other in others):
            found |= {f"{stack}.0{rest}" for rest in first.difference(*others)}
    return frozenset(found)


class SliceSource(RenamedSource):
    """Blocks [start, end) of a model, renumbered from 0; its config says so too."""

    def __init__(self, source: Source, start: int, end: int, stack: str | None = None) -> None:
        label = f"{source}[{start}:{end}]"
        super().__init__(source, slice_names(source, start, end, stack), label)
        stacks = _cut_stacks(source, start, end, stack)
        text = config_of(source)
        if text is not None:
            text = cut_config(text, {name: (count, start, end) for name, count in stacks.items()}, label)
        self.origin = replace(self.origin, config=text, cut=Cut(tuple(stacks), _pinned(source, stacks)))
