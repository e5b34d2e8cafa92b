"""A LoRA adapter on a base model, as a view: W + s B A is calculated row by row when it is read.

Sources: LoRA, arXiv:2106.09685 (s = alpha / r); rsLoRA, arXiv:2312.03732 (s = alpha / sqrt(r));
DoRA, arXiv:2402.09353 (m * (W + s B A) / |W + s B A|, one norm per output unit).
Files: adapter_config.json and adapter_model.safetensors (or .bin), as the peft library writes them.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.adapter import Change, open_weights, read_changes, read_config
from weightsmith.io.read.source import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterSource"]

CHUNK = 64
"""Rows per matrix product.  A BLAS may order its sums by the shape it is given, so the shape is always the
same: whole chunks are multiplied, then cut.  Rows read in blocks then equal rows read at once, bit for bit."""


class AdapterSource(Source):
    """The model that `base` becomes with the LoRA adapter in a folder; nothing is materialised.

    Tensors that the adapter does not touch are served as stored; `computes(name)` tells which are calculated
    (float32, or the base's dtype where that is wider).  Refused by name: other adapter types, convolutions,
    initialisations that changed the base, an adapter that does not fit the base or changes nothing.
    """

    computed = True

    def __init__(self, path: str | Path, base: Source, weights: Source | None = None, label: str = "") -> None:
        """`path`: the folder; `weights`, `label`: its tensors and name, where it is a copy of what lies elsewhere."""
        self.path = Path(path)
        self.base = base
        label = label or str(path)
        self.label = f"{label} on {base.label}"
        self.folder = base.folder
        self.weight_files = base.weight_files
        self.aliases = base.aliases
        self._config = read_config(self.path)
        self._file = weights or open_weights(self.path)
        self._changes = read_changes(self._config, self._file, base, label)
        self.keys = {
            key.name: Key(key.name, key.shape, self._file.key(change.replacement).dtype)
            if (change := self._changes.get(key.name)) and change.replacement and not change.computed
            else key
            for key in base.keys.values()
        }
        self._cache = _Recent(4)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Recent(4)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the base tensors that the adapter alters or replaces."""
        return tuple(self._changes)

    @property
    def trained_on(self) -> str:
        """What the adapter's configuration calls its base model, '' if it does not say."""
        return str(self._config.get("base_model_name_or_path") or "")

    @property
    def download_bytes(self) -> int:  # type: ignore[override]  # a constant in most sources
        return self.base.download_bytes

    def prepare(self) -> None:
        self.base.prepare()

    def computes(self, name: str) -> bool:
        change = self._changes.get(self.key(name).name)
        if change is None:
            return self.base.computes(name)
        return change.computed

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        name = self.key(name).name
        if self.computes(name):
            raise SourceError(f"{self.label}: {name!r} is calculated on reading and has no stored bits")
        change = self._changes.get(name)
        if change is None:
            return self.base.bits(name, start, stop)
        return self._file.bits(change.replacement or "", start, stop)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        name = self.key(name).name
        change = self._changes.get(name)
        if change is None or not change.computed:
            return self._stored(name, start, stop)
        if change.bias is not None:
            stored = _wide(self._stored(name, start, stop))
            return stored + change.scale * self._file.read(change.bias, start, stop).to(stored.dtype)
        first, last, _ = slice(start, stop).indices(self.key(name).rows)
        return self._rows(name, change, first, max(first, last))

    def read_cost(self, name: str) -> float:
        key = self.key(name)
        change = self._changes.get(key.name)
        cost = self.base.read_cost(name)
        if change is None or change.a is None:
            return cost
        rank = self._file.key(change.a).shape[0]
        factors = rank * (key.rows + key.row_numel) / max(key.numel, 1)
        return cost + 1.0 + factors + CHUNK / max(key.rows, CHUNK)

    def factors(self, name: str, base: Source | None = None) -> tuple[Tensor, Tensor] | None:
        """Return (left [rows, r], right [r, columns]) in float32 with W = base + left @ right, scale included.

        None where the tensor's change is not exactly such a product: untouched, replaced, DoRA, biases, or the
        change asked for is that from another model than the adapter's base.
        """
        change = self._product(name, base)
        if change is None:
            return None
        left, right = self._factors(self.key(name).name, change)
        return change.scale * left, right

    def rank(self, name: str, base: Source | None = None) -> int | None:
        change = self._product(name, base)
        return None if change is None or change.a is None else self._file.key(change.a).shape[0]

    def _product(self, name: str, base: Source | None) -> Change | None:
        """The change of a tensor, if it is exactly a product added to this base."""
        if base is not None and base is not self.base:
            return None
        change = self._changes.get(self.key(name).name)
        if change is None or change.a is None or change.magnitude is not None or change.replacement is not None:
            return None
        return change

    def places(self) -> tuple[Path, ...]:
        return (self.path, *self._file.places(), *self.base.places())

    def fingerprint(self) -> dict[str, Any]:
        config = json.dumps(self._config, sort_keys=True).encode()
        return {
            "adapter": {**self._file.fingerprint(), "config": xxhash.xxh3_64_hexdigest(config)},
            "base": self.base.fingerprint(),
        }

    # --- rows ---

    def _stored(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows before any calculation: the base's, or the adapter's own copy."""
        change = self._changes.get(name)
        if change is not None and change.replacement is not None:
            return self._file.read(change.replacement, start, stop)
        return self.base.read(name, start, stop)

    def _factors(self, name: str, change: Change) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) in the orientation of the stored weight, unscaled."""

        def load() -> tuple[Tensor, Tensor]:
            a, b = (self._file.read(part or "").float() for part in (change.a, change.b))
            return (a.T.contiguous(), b.T.contiguous()) if change.flip else (b.contiguous(), a.contiguous())

        pair: tuple[Tensor, Tensor] = self._cache.get(("factors", name), load)
        return pair

    def _chunks(self, name: str, change: Change, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Whole chunks of W + s B A that cover rows first..last, each with the row it starts at."""
        left, right = self._factors(name, change)
        for begin in range(first - first % CHUNK, last, CHUNK):
            chunk = _wide(self._stored(name, begin, begin + CHUNK))
            yield begin, chunk + (left[begin : begin + CHUNK] @ right) * change.scale

    def _rows(self, name: str, change: Change, first: int, last: int) -> Tensor:
        key = self.key(name)
        result = torch.empty(last - first, *key.shape[1:], dtype=_wide(self._stored(name, first, first)).dtype)
        for begin, chunk in self._chunks(name, change, first, last):
            rows = slice(max(first - begin, 0), last - begin)
            if change.magnitude is not None:
                chunk = self._gain(name, change, begin, chunk) * chunk
            result[begin + rows.start - first : begin + len(chunk) - first] = chunk[rows]
        return result

    def _gain(self, name: str, change: Change, begin: int, chunk: Tensor) -> Tensor:
        """DoRA's factor m / |W + s B A|: per row [rows, 1], or per column [1, columns] for flipped weights."""
        magnitude = self._file.read(change.magnitude or "").flatten().to(chunk.dtype)
        if not change.flip:
            return (magnitude[begin : begin + len(chunk)] / _squares(chunk, 1).sqrt().to(chunk.dtype))[:, None]

        def norms() -> Tensor:
            squares = (_squares(part, 0) for _, part in self._chunks(name, change, 0, self.key(name).rows))
            return sum(squares, torch.zeros(chunk.shape[1], dtype=torch.float64)).sqrt()

        lengths: Tensor = self._cache.get(("norms", name), norms)
        return (magnitude / lengths.to(chunk.dtype))[None, :]


class _Recent:
    """The last few results of a calculation, for blocks of one tensor that are read one after another."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.RLock()  # `norms` asks for `factors`
        self._held: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Any) -> Any:
        with self._lock:
            if key not in self._held:
                self._held[key] = make()
            self._held.move_to_end(key)
            while len(self._held) > self._limit:
                self._held.popitem(last=False)
            return self._held[key]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32) if tensor.element_size() > 1 else torch.float32)


def _squares(block: Tensor, axis: int) -> Tensor:
    """Sums of squares in float64, so that the order of summation does not show in float32."""
    return block.double().square().sum(dim=axis)
