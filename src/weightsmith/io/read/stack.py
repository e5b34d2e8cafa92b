"""Models put together of parts of models: slices on top of each other, modules side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key, layer_of
from weightsmith.io.read.layers import Stacked, adopt_config, config_of, stack_configs
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import block_counts

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["JoinedSource", "join_modules", "stack_slices"]

_BELOW = re.compile(r"embed|wte|wpe|shared|token|position|patch|conv|feature|(?:^|[._])pre_|ln_pre")
"""What stands in the names of tensors that come before the blocks."""


class JoinedSource(Source):
    """Tensors of several sources under one roof: `names` maps each new name to (part, its name there).

    Companion files are the first part's; `config` replaces its config.json.
    """

    def __init__(
        self,
        parts: Sequence[Source],
        names: Mapping[str, tuple[int, str]],
        label: str,
        config: str | None = None,
        stacks: tuple[str, ...] = (),
    ) -> None:
        self.parts = tuple(parts)
        self.label = label
        self.folder = parts[0].folder
        self.weight_files = parts[0].weight_files
        self.names = dict(names)
        self.stacks = stacks
        self.pinned = parts[0].pinned
        self._config = config
        keys: dict[str, Key] = {}
        aliases: dict[str, str] = {}
        shown: dict[tuple[int, str], str] = {}  # (part, the name that holds the data) -> the new name that lists it
        for new, (part, old) in sorted(self.names.items(), key=lambda item: item[1][1] in parts[item[1][0]].aliases):
            source = parts[part]
            key, tied = source.key(old), old in source.aliases
            if tied and (part, key.name) in shown:
                aliases[new] = shown[part, key.name]
            else:
                shown.setdefault((part, key.name), new)
                keys[new] = Key(new, key.shape, key.dtype)
        self.keys = {new: keys[new] for new in self.names if new in keys}
        self.aliases = aliases

    @property
    def download_bytes(self) -> int:  # type: ignore[override]  # a constant in most sources
        return sum(part.download_bytes for part in self.parts)

    def prepare(self) -> None:
        for part in self.parts:
            part.prepare()

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        source, old = self._place(name)
        return source.bits(old, start, stop)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        source, old = self._place(name)
        return source.read(old, start, stop)

    def computes(self, name: str) -> bool:
        source, old = self._place(name)
        return source.computes(old)

    def read_cost(self, name: str) -> float:
        source, old = self._place(name)
        return source.read_cost(old)

    def config_text(self) -> str | None:
        return self._config

    def places(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(place for part in self.parts for place in part.places()))

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.label, "parts": [part.fingerprint() for part in self.parts]}

    def _place(self, name: str) -> tuple[Source, str]:
        part, old = self.names[self.key(name).name]
        return self.parts[part], old


def stack_slices(parts: Sequence[Source]) -> JoinedSource:
    """Blocks of the parts one above the other, renumbered; what lies below the blocks comes from the first part,
    what lies above (final norm, head) from the last.

    Other stacks of blocks (a vision tower beside the text) come whole from the first part.  Tensors that only the
    first block of a model has (T5's relative positions) are the first part's too.
    """
    stacks = _common_stacks(parts)
    counts = [block_counts(part) for part in parts]
    names: dict[str, tuple[int, str]] = {}
    offsets = dict.fromkeys(stacks, 0)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        for old in (*part.keys, *part.aliases):
            place = layer_of(old)
            if place is not None and place[0] in stacks:
                if old in part.pinned and number:
                    continue
                stack, block = place
                names[f"{stack}.{offsets[stack] + block}{old[len(f'{stack}.{block}') :]}"] = (number, old)
            elif (number == 0) if place is not None or _is_below(old) else last:
                names[old] = (number, old)
        for stack in stacks:
            offsets[stack] += counts[number].get(stack, 0)
    label = "[" + " + ".join(part.label for part in parts) + "]"
    texts = [config_of(part) for part in parts]
    configs = [Stacked(text, {s: count.get(s, 0) for s in stacks}) for text, count in zip(texts, counts, strict=True)
               if text is not None]  # fmt: skip
    config = stack_configs(configs, label) if len(configs) == len(parts) else None
    return JoinedSource(parts, names, label, config, stacks)


def _common_stacks(parts: Sequence[Source]) -> tuple[str, ...]:
    """The stacks that all parts are slices of; for whole models their longest."""
    found = []
    for part in parts:
        counts = block_counts(part)
        found.append(part.stacks or tuple(s for s, count in counts.items() if count == max(counts.values())))
    if len(set(found)) != 1 or not found[0]:
        each = "; ".join(
            f"{part.label}: {', '.join(stacks) or 'no blocks'}" for part, stacks in zip(parts, found, strict=True)
        )
        raise SourceError(f"slices of unlike stacks of blocks ({each}); say which is meant, as stack: model.layers")
    return found[0]


def _is_below(name: str) -> bool:
    return _BELOW.search(name.lower()) is not None


def join_modules(parts: Mapping[str, Source]) -> JoinedSource:
    """Every part's tensors under their own names; the parts have none in common.

    Companion files are the first part's; its config.json takes over what the others say of their slices.
    """
    names = {n: (i, n) for i, part in enumerate(parts.values()) for n in (*part.keys, *part.aliases)}
    label = "{" + ", ".join(f"{name}: {part.label}" for name, part in parts.items()) + "}"
    first, *others = parts.values()
    text = config_of(first)
    for part in others if text is not None else ():
        theirs = config_of(part)
        if part.stacks and theirs is not None and text is not None:
            counts = {s: n for s, n in block_counts(part).items() if s in part.stacks}
            text = adopt_config(text, Stacked(theirs, counts), label)
    return JoinedSource(tuple(parts.values()), names, label, text)
