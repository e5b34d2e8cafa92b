"""Mixtures of experts in two layouts: one tensor per expert (published checkpoints), or all in one (transformers 5).

    unpacked   X.experts.E.gate_proj.weight [i, d], up_proj [i, d], down_proj [d, i]; Mixtral: w1, w3, w2
    packed     X.experts.gate_up_proj [n, 2 i, d], X.experts.down_proj [n, d, i]

Mixtral's module X is `block_sparse_moe` in the one and `mlp` in the other.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch
from weightsmith.io.architectures import EXPERT_WORDS, MIXTRAL_MODULE
from weightsmith.io.read.source import Bits, Block, Source
from weightsmith.io.read.views import View

__all__ = ["PackedExperts", "UnpackedExperts", "laid_out_for", "laid_out_like", "packed_like_memory", "stored_as"]

_ONE = re.compile(r"(?P<module>.+)\.experts\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_ALL = re.compile(r"(?P<module>.+)\.experts\.(?P<part>gate_up_proj|down_proj)")
_NAMED = re.compile(r"\.experts(?:\.(?P<number>\d+)\.(?P<part>\w+)|(?:\.base_layer)*$|\.(?:gate_up|down)_proj$)")
_KEPT = 2  # experts kept: a reader goes through one tensor block by block


def laid_out_like(source: Source, reference: Source) -> Source:
    """The source, or a view of it with its experts in the layout of `reference`, where the two differ."""
    mine, theirs = _layout(source), _layout(reference)
    if mine == theirs or None in (mine, theirs):
        return source
    if theirs == "packed":
        return _packed(source) or source
    if mine == "packed":
        return _unpacked(source, mixtral=theirs == "mixtral") or source
    return source


def packed_like_memory(source: Source) -> Source:
    """The source, or a view of it with all experts of a module in one tensor, as transformers 5 has them in memory."""
    return (_packed(source) or source) if _layout(source) in ("mixtral", "") else source


def stored_as(source: Source, names: Iterable[str]) -> set[str]:
    """The tensors of a source that hold the given ones of `packed_like_memory`."""
    packed = packed_like_memory(source)
    if not isinstance(packed, PackedExperts):
        return {source.key(name).name for name in names}
    return {tensor for name in names for tensor in packed.made_of(name) or (packed.own(name)[1],)}


def laid_out_for(source: Source, names: Iterable[str]) -> Source:
    """The source, or a view of it with its experts laid out as an adapter's names are."""
    wanted = next((layout for layout in map(_layout_of, names) if layout is not None), None)
    mine = _layout(source)
    if wanted == "packed" and mine in ("mixtral", ""):
        return _packed(source) or source
    if wanted in ("mixtral", "") and mine == "packed":
        return _unpacked(source, mixtral=wanted == "mixtral") or source
    return source


def _layout_of(name: str) -> str | None:
    """The layout that the name of an adapter's module or tensor belongs to; None where experts are not meant."""
    if (found := _NAMED.search(name)) is None:
        return None
    if found["number"] is None:
        return "packed"
    return "mixtral" if found["part"] in EXPERT_WORDS["mixtral"] else ""


def _layout(source: Source) -> str | None:
    """'packed', 'mixtral' or '' (other unpacked ones); None for a model without experts."""
    for name in source.keys:
        if (found := _ONE.fullmatch(name)) is not None:
            return "mixtral" if found["part"].startswith("w") else ""
        if _ALL.fullmatch(name):
            return "packed"
    return None


def _packed(source: Source) -> Source | None:
    """All experts of a module in two tensors; None where theirs do not fit together."""
    modules: dict[str, dict[str, dict[int, str]]] = {}
    for name in source.keys:
        if (found := _ONE.fullmatch(name)) is not None:
            place = modules.setdefault(found["module"], {}).setdefault(found["part"], {})
            place[int(found["number"])] = name
    words = EXPERT_WORDS["mixtral" if any("w1" in parts for parts in modules.values()) else ""]
    made: dict[str, tuple[Key, tuple[tuple[str, ...], ...]]] = {}
    for module, parts in modules.items():
        if any(sorted(parts.get(word, {})) != list(range(len(parts.get(words[0], {})))) for word in words):
            return None
        count = len(parts[words[0]])
        target = _renamed(module, *MIXTRAL_MODULE)
        for name, chosen in (("gate_up_proj", words[:2]), ("down_proj", words[2:])):
            rows = tuple(tuple(parts[word][i] for word in chosen) for i in range(count))
            keys = {source.key(tensor) for row in rows for tensor in row}
            shapes, dtypes = {k.shape for k in keys}, {k.dtype for k in keys}
            if len(shapes) != 1 or len(dtypes) != 1:
                return None
            (shape,), (dtype,) = shapes, dtypes
            full = f"{target}.experts.{name}"
            made[full] = (Key(full, (count, shape[0] * len(chosen), *shape[1:]), dtype), rows)
    return PackedExperts(source, made)


def _unpacked(source: Source, *, mixtral: bool) -> Source | None:
    """Every expert in tensors of its own; None where the packed ones are not laid out as expected."""
    words = EXPERT_WORDS["mixtral" if mixtral else ""]
    made: dict[str, tuple[Key, tuple[str, int, int]]] = {}
    for name, key in source.keys.items():
        if (found := _ALL.fullmatch(name)) is None:
            continue
        down = source.keys.get(f"{found['module']}.experts.down_proj")
        if len(key.shape) != 3 or down is None or len(down.shape) != 3:
            return None
        if found["part"] == "gate_up_proj" and key.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
            return None  # transposed, or interleaved: another order
        target = _renamed(found["module"], *MIXTRAL_MODULE[::-1]) if mixtral else found["module"]
        chosen = words[:2] if found["part"] == "gate_up_proj" else words[2:]
        rows = key.shape[1] // len(chosen)
        for i in range(key.shape[0]):
            for at, word in enumerate(chosen):
                full = f"{target}.experts.{i}.{word}.weight"
                made[full] = (Key(full, (rows, key.shape[2]), key.dtype), (name, i, at * rows))
    return UnpackedExperts(source, made, (MIXTRAL_MODULE[1], MIXTRAL_MODULE[0]) if mixtral else None)


def _renamed(module: str, old: str, new: str) -> str:
    head, _, last = module.rpartition(".")
    return f"{head}.{new}" if head and last == old else module


class _Experts(View):
    """Experts in another layout; all other tensors as they are, some under another name."""

    def __init__(self, source: Source, made: Mapping[str, Key], replaced: set[str], names: Mapping[str, str]) -> None:
        super().__init__(source)
        kept = {names.get(name, name): key for name, key in source.keys.items() if name not in replaced}
        self._old = {new: key.name for new, key in kept.items()}
        self.keys = {**{new: Key(new, key.shape, key.dtype) for new, key in kept.items()}, **made}
        self.aliases = {names.get(a, a): names.get(n, n) for a, n in source.aliases.items()}
        self.shows = type(self).__name__

    def own(self, name: str) -> tuple[Source, str]:
        return self.source, self._old[self.key(name).name]


class PackedExperts(_Experts):
    """Experts of their own as one tensor per module; an expert is a row."""

    def __init__(self, source: Source, made: Mapping[str, tuple[Key, tuple[tuple[str, ...], ...]]]) -> None:
        replaced = {tensor for _, rows in made.values() for row in rows for tensor in row}
        names = {n: n.replace(".block_sparse_moe.", ".mlp.") for n in source.keys if n not in replaced}
        super().__init__(source, {name: key for name, (key, _) in made.items()}, replaced, names)
        self._rows = {name: rows for name, (_, rows) in made.items()}

    def made_of(self, name: str) -> list[str]:
        """The stored tensors that a packed one is made of; none for the others."""
        return [part for row in self._rows.get(self.key(name).name, ()) for part in row]

    def computes(self, name: str) -> bool:
        parts = self.made_of(name)
        return any(map(self.source.computes, parts)) if parts else super().computes(name)

    def read_cost(self, name: str) -> float:
        parts = self.made_of(name)
        return max(map(self.source.read_cost, parts)) if parts else super().read_cost(name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if key.name not in self._rows:
            return super().block(name, low, high, into)
        rows = self._rows[key.name][slice(low, high)]
        if self.computes(name):
            if not rows:
                return torch.empty((0, *key.shape[1:]))
            return torch.stack([torch.cat([self.source.read(part) for part in row]) for row in rows])
        found = np.empty((len(rows), *key.shape[1:]), f"u{DTYPES[key.dtype].itemsize}") if into is None else into
        for expert, row in zip(found, rows, strict=True):
            step = len(expert) // len(row)
            for at, part in enumerate(row):
                expert[at * step : (at + 1) * step] = self.source.bits(part)
        return Bits(found, key.dtype)


class UnpackedExperts(_Experts):
    """Rows of packed experts as tensors of their own; the expert read last is kept."""

    def __init__(
        self, source: Source, made: Mapping[str, tuple[Key, tuple[str, int, int]]], rename: tuple[str, str] | None
    ) -> None:
        replaced = {tensor for _, (tensor, _, _) in made.values()}
        modules = {m["module"] for name in replaced if (m := _ALL.fullmatch(name))}
        names = {}
        if rename is not None:
            for name in source.keys:
                module = next((m for m in modules if name.startswith(f"{m}.")), None)
                if module is not None:
                    names[name] = _renamed(module, *rename) + name[len(module) :]
        super().__init__(source, {name: key for name, (key, _) in made.items()}, replaced, names)
        self._where = {name: where for name, (_, where) in made.items()}
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[tuple[str, int], Block] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def own(self, name: str) -> tuple[Source, str]:
        name = self.key(name).name
        return (self.source, self._where[name][0]) if name in self._where else super().own(name)

    def read_cost(self, name: str) -> float:
        return super().read_cost(name) + (2.0 * _KEPT if self.key(name).name in self._where else 0.0)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if key.name not in self._where:
            return super().block(name, low, high, into)
        tensor, number, first = self._where[key.name]
        begin, end, _ = slice(low, high).indices(key.rows)
        rows = slice(first + begin, first + max(begin, end))
        found = self._expert(tensor, number)
        return Bits(found.array[0, rows], found.dtype) if isinstance(found, Bits) else found[0, rows]

    def _expert(self, tensor: str, number: int) -> Block:
        """One row of a packed tensor, which can only be read whole."""
        with self._lock:
            if (tensor, number) not in self._last:
                self._last[tensor, number] = self.source.block(tensor, number, number + 1)
                while len(self._last) > _KEPT:
                    self._last.popitem(last=False)
            self._last.move_to_end((tensor, number))
            return self._last[tensor, number]
