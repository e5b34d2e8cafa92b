"""A model shown in another vocabulary: its token tensors have other rows, computed as they are read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.source import Block, LowRank, Source
from weightsmith.io.read.views import View
from weightsmith.tokens.layout import Layout
from weightsmith.tokens.numbering import Numbering

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RenumberedSource", "RenumberedStatistic", "VocabularyView", "gather"]

_BRIDGE = 16
"""Rows read for nothing where that saves starting another read."""

_STEP = 4096
"""Rows at a time of a pass over a whole tensor; fixed, so that sums do not depend on settings."""


class VocabularyView(View):
    """A source whose tensors `tokens` have `rows` rows, numbered by another vocabulary.  See `RenumberedSource`."""

    def __init__(self, source: Source, tokens: Collection[str], rows: int, numbering: Numbering | None) -> None:
        super().__init__(source)
        self.tokens = frozenset(tokens)
        changed = {n: Key(n, (rows, *k.shape[1:]), k.dtype) for n, k in self.keys.items() if n in self.tokens}
        self.keys = {**self.keys, **changed}
        if numbering is not None:
            text = config_of(source)
            config = None if text is None else numbering.config(text)
            self.origin = replace(source.origin, config=config, numbering=numbering)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def rows_of(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a token tensor in the new vocabulary: float32, or float64 where that is stored."""
        raise NotImplementedError

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if key.name not in self.tokens:
            return super().block(name, low, high, into)
        return self.rows_of(key.name, low, key.rows if high is None else min(high, key.rows))

    def computes(self, name: str) -> bool:
        return self.key(name).name in self.tokens or super().computes(name)

    def read_cost(self, name: str) -> float:
        return super().read_cost(name) + (3.0 if self.key(name).name in self.tokens else 0.0)

    def factors(self, name: str, base: Source) -> LowRank | None:
        return None if self.key(name).name in self.tokens else self.source.factors(name, _inner(base))


class RenumberedSource(VocabularyView):
    """One of several models, laid out for the vocabulary that they share.

    source  the model;  model: its name in `layout`
    peers   all models by name, this one too: their rows stand in for those it lacks
    tokens  its tensors with a row per token
    """

    def __init__(
        self,
        source: Source,
        model: str,
        peers: Mapping[str, Source],
        layout: Layout,
        tokens: Collection[str],
        numbering: Numbering | None = None,
    ) -> None:
        super().__init__(source, tokens, layout.rows, numbering)
        self.model, self.peers, self.layout = model, dict(peers), layout
        self._means: dict[str, Tensor] = {}

    def rows_of(self, name: str, start: int, stop: int) -> Tensor:
        out = self._known(name, start, stop)
        filled = torch.from_numpy(self.layout.filled(self.model)[start:stop])
        if bool(filled.any()):
            out[filled] = self._mean(name).to(out.dtype)
        return out

    def _known(self, name: str, start: int, stop: int) -> Tensor:
        """The rows, with zeros for those that are the mean of the others."""
        key = self.source.key(name)
        dtype = torch.float64 if key.dtype == "float64" else torch.float32
        own = self.layout.own[self.layout.models.index(self.model), start:stop]
        out = torch.zeros((own.size, *key.shape[1:]), dtype=dtype)
        here = own >= 0
        if here.any():
            out[torch.from_numpy(here)] = gather(self.source, name, own[here]).to(dtype)
        if not here.all():
            out[torch.from_numpy(~here)] = self._stand_ins(name, self.layout.fallback[:, start:stop][:, ~here]).to(
                dtype
            )
        return out

    def _stand_ins(self, name: str, rows: np.ndarray) -> Tensor:
        """Means over models, in float64: rows [models, n] -> [n, *rest]."""
        rest = self.source.key(name).shape[1:]
        total = torch.zeros((rows.shape[1], *rest), dtype=torch.float64)
        for model, wanted in zip(self.layout.models, rows, strict=True):
            there = wanted >= 0
            if there.any():
                peer = self.peers[model]
                if peer.key(name).shape[1:] != rest:
                    raise SourceError(f"{name} is {list(peer.key(name).shape)} in {model}; its rows do not fit here")
                total[torch.from_numpy(there)] += gather(peer, name, wanted[there]).double()
        count = torch.from_numpy((rows >= 0).sum(axis=0).clip(min=1))
        return total / count.reshape(-1, *[1] * len(rest))

    def _mean(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._means:
                key = self.key(name)
                total = torch.zeros(key.shape[1:], dtype=torch.float64)
                for low in range(0, key.rows, _STEP):
                    total += self._known(name, low, min(low + _STEP, key.rows)).double().sum(dim=0)
                self._means[name] = total / max(int((~self.layout.filled(self.model)).sum()), 1)
            return self._means[name]

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for part in (self.layout.own, self.layout.fallback, self.layout.zero):
            digest.update(np.ascontiguousarray(part).tobytes())
        return {"vocabulary": digest.hexdigest(), "source": self.source.fingerprint()}


class RenumberedStatistic(VocabularyView):
    """A statistic with a value per weight (a Fisher information), laid out as `model` is.

    What stands in for a row that the model lacks was not measured: 0, so that the models that have the row decide.
    """

    def __init__(self, source: Source, model: RenumberedSource) -> None:
        alike = [n for n in model.tokens if n in source.keys and source.keys[n].shape == model.source.key(n).shape]
        super().__init__(source, alike, model.layout.rows, None)
        self._own = model.layout.own[model.layout.models.index(model.model)]

    def rows_of(self, name: str, start: int, stop: int) -> Tensor:
        own = self._own[start:stop]
        out = torch.zeros((own.size, *self.key(name).shape[1:]), dtype=torch.float32)
        if (here := own >= 0).any():
            out[torch.from_numpy(here)] = gather(self.source, name, own[here]).float()
        return out

    def fingerprint(self) -> dict[str, Any]:
        rows = hashlib.sha256(np.ascontiguousarray(self._own).tobytes()).hexdigest()
        return {"vocabulary": rows, "source": self.source.fingerprint()}


def gather(source: Source, name: str, rows: np.ndarray) -> Tensor:
    """The given rows of a tensor, in their order: [len(rows), *rest] in its stored dtype.  Reads runs of rows."""
    wanted, back = np.unique(rows, return_inverse=True)
    if not wanted.size:
        return source.read(name, 0, 0)
    breaks = np.flatnonzero(np.diff(wanted) > _BRIDGE) + 1
    pieces = []
    for run in np.split(wanted, breaks):
        read = source.read(name, int(run[0]), int(run[-1]) + 1)
        pieces.append(read if len(run) == len(read) else read[torch.from_numpy(run - run[0])])
    return torch.cat(pieces)[torch.from_numpy(back)]


def _inner(source: Source) -> Source:
    return source.source if isinstance(source, VocabularyView) else source
