"""Views: sources that show another source in another way, without copying it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.errors import SourceError
from weightsmith.io.source import Source
from weightsmith.keys import Key, layer_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["RenamedSource", "SliceSource", "slice_names"]


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

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.names[self.key(name).name], start, stop)

    def computes(self, name: str) -> bool:
        return self.source.computes(self.names[self.key(name).name])

    def read_cost(self, name: str) -> float:
        return self.source.read_cost(self.names[self.key(name).name])

    def places(self) -> tuple[Path, ...]:
        return self.source.places()

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.label, "source": self.source.fingerprint()}


def slice_names(source: Source, start: int, end: int) -> dict[str, str]:
    """Map new names to old for blocks [start, end), renumbered from 0; tensors outside the blocks keep theirs.

    A model may have several stacks of blocks (vision and text): those with fewer than `end` blocks stay whole.
    """
    names = (*source.keys, *source.aliases)
    places = {name: layer_of(name) for name in names}
    blocks: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            blocks[place[0]] = max(blocks.get(place[0], 0), place[1] + 1)
    if not 0 <= start < end or all(count < end for count in blocks.values()):
        have = ", ".join(f"{stack} has {count}" for stack, count in blocks.items()) or "it has none"
        raise SourceError(f"{source.label}: cannot take blocks [{start}, {end}): {have}")
    chosen: dict[str, str] = {}
    for name, place in places.items():
        if place is None or blocks[place[0]] < end:
            chosen[name] = name
        elif start <= place[1] < end:
            stack, block = place
            chosen[f"{stack}.{block - start}{name[len(f'{stack}.{block}') :]}"] = name
    return chosen


class SliceSource(RenamedSource):
    """Blocks [start, end) of a model, renumbered from 0."""

    def __init__(self, source: Source, start: int, end: int) -> None:
        super().__init__(source, slice_names(source, start, end), f"{source.label}[{start}:{end}]")
