"""An adapter on a base model, as a view: what it adds is calculated row by row when a tensor is read.

Sources: LoRA, arXiv:2106.09685 (W + s B A, s = alpha / r); DoRA, arXiv:2402.09353 (m * (W + s B A) / |W + s B A|, one
norm per output unit).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.changes import Change, Changes
from weightsmith.io.read.experts import laid_out_for
from weightsmith.io.read.fitting import fitted
from weightsmith.io.read.headed import headed_config, untrained
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.lora import NOT_SAVED, Adapter, not_saved
from weightsmith.io.read.mlx_lora import read_folder
from weightsmith.io.read.source import Block, LowRank, Origin, Source
from weightsmith.io.read.svfit import Singular, SpectralSource
from weightsmith.io.read.trained_on import other_base
from weightsmith.io.read.untied import grown_config, untied_config
from weightsmith.io.read.views import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterSource", "adapter_in"]


class AdapterSource(View):
    """The model that `base` becomes with an adapter; nothing is materialised.

    Tensors that the adapter does not touch are served as stored; `computes(name)` tells which are calculated
    (float32, or the base's dtype where that is wider).  Refused by name: what the adapter's kind or configuration
    does not allow, and an adapter that does not fit the base or changes nothing.
    """

    def __init__(self, adapter: str | Path | Adapter, base: Source) -> None:
        """`adapter`: a PEFT folder, or an adapter that was read."""
        self.adapter = adapter if isinstance(adapter, Adapter) else read_folder(Path(adapter))
        self.path = self.adapter.path
        self.base = base = laid_out_for(base, (*self.adapter.modules, *self.adapter.whole))
        self._file = self.adapter.file
        modules = [name.rpartition(".")[0] for name in (*base.keys, *base.aliases)]
        for name in not_saved(self.adapter.config, self.adapter.whole):
            if any(module.endswith(name) for module in modules):
                raise SourceError(f"{self.adapter.label}: {NOT_SAVED.format(name)} peft cannot load it either; save "
                                  f"the adapter anew, or take {name!r} out of its configuration")  # fmt: skip
        found = fitted(self.adapter, base)
        remarks = (*found.says, *filter(None, [other_base(self.adapter.config, base.origin)]))
        own = Origin(self.adapter.label, locations=(self.path, *self._file.origin.locations), remarks=remarks)
        super().__init__(base, self._file, origin=base.origin.beside(own, label=f"{own.label} on {base}"))
        self._changes, self.untied = found.tensors, found.untied
        self._file = _with_vectors(self._file, base, found)
        gone = found.dropped.union(found.untied)
        self.aliases = {alias: name for alias, name in base.aliases.items() if alias not in gone}
        kept = (key for key in base.keys.values() if key.name not in found.dropped)
        self.keys = {key.name: self._key(found.keys.get(key.name, key)) for key in kept}
        self.keys |= {name: self._key(key) for name, key in found.keys.items() if name not in base.keys}
        self.origin = replace(
            self.origin,
            checkpoint=self.path if self.path.is_dir() else None,
            heads=found.heads,
            config=self._config(found),
        )
        self._cache = _Recent(4)
        if found.heads and (text := self.origin.config) and (random := untrained(text, (*self.keys, *self.aliases))):
            said = (
                f"neither the adapter nor its base has {some(random)} of the class that the result has: transformers "
                "begins them at random"
            )
            self.origin = replace(self.origin, remarks=(*self.origin.remarks, said))

    def _config(self, found: Changes) -> str | None:
        """The base's config.json, changed where the result is no longer tied, has more tokens, or another head."""
        grown = {self.base.keys[n].rows: key.rows for n, key in found.keys.items() if n in self.base.keys}
        if not (found.untied or grown or found.heads):
            return self.base.origin.config
        text = config_of(self.base)
        if text is not None and found.untied:
            text = untied_config(text)
        if text is not None and grown:
            text = grown_config(text, grown)
        if text is not None and found.heads:
            text = headed_config(text, self.adapter, [self.keys[name] for name in found.heads])
        return text

    def _key(self, key: Key) -> Key:
        change = self._changes.get(key.name)
        if change is None or change.replacement is None or change.computed:
            return key
        return Key(key.name, key.shape, self._file.key(change.replacement).dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Recent(4)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that the adapter alters, replaces or adds."""
        return tuple(self._changes)

    @property
    def trained_on(self) -> str:
        """What the adapter's configuration calls its base model, '' if it does not say."""
        return str(self.adapter.config.get("base_model_name_or_path") or "")

    def own(self, name: str) -> tuple[Source, str]:
        """Where a tensor lies before any calculation: in the base, or in the adapter's file."""
        name = self.key(name).name
        change = self._changes.get(name, Change())
        return (self._file, change.replacement) if change.replacement is not None else (self.base, change.of or name)

    def computes(self, name: str) -> bool:
        change = self._changes.get(self.key(name).name)
        return (change is not None and change.computed) or super().computes(name)

    def quick(self, name: str) -> bool:
        change = self._changes.get(self.key(name).name, Change())
        if not change.computed:
            return super().quick(name)
        return change.magnitude is None and change.update is not None and self.base.quick(change.of or name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        change = self._changes.get(key.name, Change())
        if not change.computed:
            return super().block(name, low, high, into)
        first, last, _ = slice(low, high).indices(key.rows)
        if change.update is None:
            stored = self._stored(key.name, low, high)
            if change.bias is not None:
                stored = _wide(stored)
                return stored + change.scale * self._file.read(change.bias, low, high).to(stored.dtype)
            return self._with_rows(change, stored, first)
        return self._rows(key.name, change, first, max(first, last))

    def read_cost(self, name: str) -> float:
        key = self.key(name)
        change = self._changes.get(key.name, Change())
        cost = self.base.read_cost(change.of or key.name) if change.of or key.name in self.base.keys else 0.0
        if change.update is None:
            return cost
        stored = sum(self._file.key(part).numel for part in change.update.stored)
        if self._file.computes(change.update.stored[0]):  # an SVD in float64
            cost += 12.0
        return cost + 1.0 + stored / max(key.numel, 1) + change.update.chunk / max(key.rows, change.update.chunk)

    def factors(self, name: str, base: Source) -> LowRank | None:
        """The scale is in `left`; both are float32.

        None where the tensor's change is not exactly such a product: untouched, replaced, DoRA, biases, fused experts,
        or the change asked for is that from another model than the adapter's base.
        """
        key = self.key(name)
        change = self._changes.get(key.name)
        if base is not self.base or change is None or change.update is None or len(key.shape) != 2:
            return None
        if not (change.magnitude is None and change.replacement is None and change.rows is None and change.of is None):
            return None
        update, scale, flip = change.update, change.scale, change.flip

        def read() -> tuple[Tensor, Tensor]:
            ((b, a),) = update.pieces(self._file)
            left, right = (a.T.contiguous(), b.T.contiguous()) if flip else (b, a)
            return scale * left, right

        return LowRank(update.rank, read)

    def fingerprint(self) -> dict[str, Any]:
        return {"adapter": self.adapter.fingerprint(), "base": self.base.fingerprint()}

    # --- rows ---

    def _stored(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows before any calculation: the base's, or the adapter's own copy."""
        source, name = self.own(name)
        return source.read(name, start, stop)

    def _with_rows(self, change: Change, stored: Tensor, first: int) -> Tensor:
        """Rows of an embedding, from `first` on, with those of trained tokens in their place."""
        assert change.rows is not None
        trained = self._file.read(change.rows.stored)
        found = stored.to(torch.promote_types(stored.dtype, trained.dtype)).clone()
        for i, token in enumerate(change.rows.indices):
            if first <= token < first + len(found):
                found[token - first] = trained[i].to(found.dtype)
        return found

    def _loaded(self, name: str, change: Change) -> tuple[Tensor, ...]:
        assert change.update is not None
        update = change.update
        found: tuple[Tensor, ...] = self._cache.get(("update", name), lambda: update.load(self._file, change.flip))
        return found

    def _chunks(self, name: str, change: Change, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Whole chunks of W + s (what is added) that cover rows first..last, each with the row it starts at."""
        assert change.update is not None
        update, loaded, rows = change.update, self._loaded(name, change), self.key(name).rows
        for begin in range(first - first % update.chunk, last, update.chunk):
            end = min(begin + update.chunk, rows)
            chunk = _wide(self._stored(name, begin, end))
            if change.rows is not None:
                chunk = _wide(self._with_rows(change, chunk, begin))
            yield begin, chunk + update.rows(loaded, begin, end).reshape(chunk.shape) * change.scale

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
        """DoRA's factor m / |W + s B A|: per row [rows, 1, ...], or per column [1, columns, 1, ...]."""
        magnitude = self._file.read(change.magnitude or "").flatten().to(chunk.dtype)
        rest = (1,) * (chunk.ndim - 2)
        if change.flip == change.inward:
            lengths = _squares(chunk.flatten(1), 1).sqrt().to(chunk.dtype)
            return (magnitude[begin : begin + len(chunk)] / lengths).reshape(-1, 1, *rest)

        def norms() -> Tensor:
            squares = (_columns(part) for _, part in self._chunks(name, change, 0, self.key(name).rows))
            return sum(squares, torch.zeros(chunk.shape[1], dtype=torch.float64)).sqrt()

        columns: Tensor = self._cache.get(("norms", name), norms)
        return (magnitude / columns.to(chunk.dtype)).reshape(1, -1, *rest)


def _with_vectors(file: Source, base: Source, found: Changes) -> Source:
    """The adapter's file, with singular vectors from the base where SVFit left them out."""
    missing = {
        change.update.u: (name, change.flip, change.update)
        for name, change in found.tensors.items()
        if isinstance(change.update, Singular) and change.update.u not in file.keys
    }
    return SpectralSource(file, base, missing) if missing else file


def adapter_in(source: Source) -> AdapterSource | None:
    """The adapter that a source shows, through whatever views; None for a model."""
    while isinstance(source, View) and not isinstance(source, AdapterSource):
        source = source.source
    return source if isinstance(source, AdapterSource) else None


class _Recent:
    """The last few results of a calculation, for blocks of one tensor that are read one after another."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.RLock()  # `norms` asks for the update
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


def _columns(block: Tensor) -> Tensor:
    """Sums of squares of each column of a weight, kernels included."""
    return _squares(block.flatten(2).transpose(1, 2).flatten(0, 1) if block.ndim > 2 else block, 0)
