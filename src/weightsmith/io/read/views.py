"""Views: sources that show another source in another way, without copying it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key, layer_of
from weightsmith.io.read.layers import config_of, cut_config
from weightsmith.io.read.source import Source

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["RenamedSource", "SliceSource", "block_counts", "slice_names"]


class RenamedSource(Source):
    """Some tensors of a source under other names: `names` maps each new name to the source's own.

    Tensors that `names` leaves out are not there.  A tied name may be given new names like any other; it
    stays tied if the name that holds its data is there too, else it becomes a tensor of its own.
    """

    def __init__(self, source: Source, names: Mapping[str, str], label: str | None = None) -> None:
        self.source = source
        self.label = label or source.label
        self.folder = source.folder
        self.weight_files = source.weight_files
        self.computed = source.computed
        self.stacks = source.stacks
        self.pinned = source.pinned
        self.beside = source.beside
        self.names = dict(names)
        keys: dict[str, Key] = {}
        aliases: dict[str, str] = {}
        shown: dict[str, str] = {}  # the source's name for the data -> the new name that lists it
        held_first = sorted(self.names.items(), key=lambda item: item[1] in source.aliases)
        for new, old in held_first:
            key = source.key(old)
            if shown.setdefault(key.name, new) == new:
                keys[new] = Key(new, key.shape, key.dtype)
            else:
                aliases[new] = shown[key.name]
        self.keys = {new: keys[new] for new in self.names if new in keys}
        self.aliases = aliases

    @property
    def download_bytes(self) -> int:  # type: ignore[override]  # a constant in most sources
        return self.source.download_bytes

    def prepare(self) -> None:
        self.source.prepare()

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.source.bits(self.names[self.key(name).name], start, stop)

    def read_into(self, out: np.ndarray, name: str, start: int = 0, stop: int | None = None) -> None:
        self.source.read_into(out, self.names[self.key(name).name], start, stop)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.names[self.key(name).name], start, stop)

    def computes(self, name: str) -> bool:
        return self.source.computes(self.names[self.key(name).name])

    def read_cost(self, name: str) -> float:
        return self.source.read_cost(self.names[self.key(name).name])

    def config_text(self) -> str | None:
        return self.source.config_text()

    def places(self) -> tuple[Path, ...]:
        return self.source.places()

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.label, "source": self.source.fingerprint()}


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
        raise SourceError(f"{source.label}: cannot take blocks [{start}, {end}){of}: {have}")
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
        super().__init__(source, slice_names(source, start, end, stack), f"{source.label}[{start}:{end}]")
        cut = _cut_stacks(source, start, end, stack)
        self.stacks = tuple(cut)
        self.pinned = _pinned(source, cut)
        self._cuts = {name: (count, start, end) for name, count in cut.items()}

    def config_text(self) -> str | None:
        text = config_of(self.source)
        return None if text is None else cut_config(text, self._cuts, self.label)
