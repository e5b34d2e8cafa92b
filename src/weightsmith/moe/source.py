"""The mixture as a source: every tensor read from the dense model that it comes from, when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.source import Bits, Block, Origin, Source
from weightsmith.io.read.views import View
from weightsmith.ops.noise import normal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MoeSource", "Piece"]


@dataclass(frozen=True)
class Piece:
    """Where one tensor of the mixture comes from.

    key    as it is stored in the mixture
    parts  (model's name, tensor's name there); several are put side by side along `axis`; none: made here
    noise  standard deviation of what is added, `scale` a factor; `expert` keys the noise
    """

    key: Key
    parts: tuple[tuple[str, str], ...] = ()
    axis: int = 0
    noise: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    @property
    def story(self) -> str:
        """How it is made, for the manifest."""
        if not self.parts:
            return "router"
        told = " + ".join(f"copied from {model} ({name})" for model, name in self.parts)
        extra = [f"noise={sigma:g}" for sigma in self.noise if sigma] + [f"times {s:g}" for s in self.scale if s != 1]
        return ", ".join([told, *extra])

    @property
    def edited(self) -> bool:
        return any(self.noise) or any(s != 1 for s in self.scale)


class MoeSource(View):
    """The tensors that `pieces` describe.

    sources  model's name -> source
    made     tensors that come from no model (routers, their corrections), by name; filled in before they are read
    """

    def __init__(
        self,
        pieces: Mapping[str, Piece],
        sources: Mapping[str, Source],
        aliases: Mapping[str, str],
        folder: Path | None,
        seed: int,
    ) -> None:
        origin = Origin("mixture of experts", folder).beside(*(source.origin for source in sources.values()))
        super().__init__(*sources.values(), origin=origin)
        self.pieces, self.sources, self.seed = dict(pieces), dict(sources), seed
        self.keys = {name: piece.key for name, piece in self.pieces.items()}
        self.aliases = dict(aliases)
        self.made: dict[str, Tensor] = {}

    def computes(self, name: str) -> bool:
        piece = self.pieces[self.key(name).name]
        if not piece.parts or piece.edited:
            return True
        return any(
            self.sources[model].computes(tensor) or self.sources[model].key(tensor).dtype != piece.key.dtype
            for model, tensor in piece.parts
        )

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        piece = self.pieces[self.key(name).name]
        if not piece.parts:
            return self.made[piece.key.name][low:high]
        if self.computes(name):
            return self._computed(piece, low, high)
        if len(piece.parts) == 1:
            model, tensor = piece.parts[0]
            return self.sources[model].block(tensor, low, high, into)
        taken = [self.sources[m].bits(t, *rows) for (m, t), rows in self._rows(piece, low, high)]
        return Bits(np.concatenate(taken, piece.axis), piece.key.dtype)

    def _computed(self, piece: Piece, start: int, stop: int | None) -> Tensor:
        taken = []
        for i, ((model, tensor), rows) in enumerate(self._rows(piece, start, stop)):
            value = self.sources[model].read(tensor, *rows)
            if piece.edited:
                value = self._edited(value.float(), piece, i, tensor, rows[0])
            taken.append(value)
        return taken[0] if len(taken) == 1 else torch.cat([value.float() for value in taken], piece.axis)

    def _rows(self, piece: Piece, start: int, stop: int | None) -> list[tuple[tuple[str, str], tuple[int, int]]]:
        """Which rows of which parts make up rows start..stop."""
        first, last, _ = slice(start, stop).indices(piece.key.rows)
        if piece.axis or len(piece.parts) == 1:
            return [(part, (first, last)) for part in piece.parts]
        found, at = [], 0
        for part in piece.parts:
            rows = self.sources[part[0]].key(part[1]).rows
            low, high = max(first - at, 0), min(last - at, rows)
            if low < high:
                found.append((part, (low, high)))
            at += rows
        return found

    def _edited(self, value: Tensor, piece: Piece, index: int, tensor: str, start: int) -> Tensor:
        model, _ = piece.parts[index]
        if piece.noise[index]:
            offset = start * (value.numel() // max(value.shape[0], 1))
            drawn = normal(self.seed, tensor, model, "moe", offset, value.numel())
            value = value + piece.noise[index] * torch.from_numpy(drawn).float().reshape(value.shape)
        return value * piece.scale[index]

    def fingerprint(self) -> dict[str, Any]:
        return {name: source.fingerprint() for name, source in self.sources.items()}

    def read_cost(self, name: str) -> float:
        piece = self.pieces[self.key(name).name]
        return max((self.sources[m].read_cost(t) for m, t in piece.parts), default=0.0) + 2.0 * self.computes(name)
