"""One of two models in the layout of a partial merge: wider MLPs, whose average with the other's is the merged model.

Hidden units are [merged | separate of the reference | separate of the moving model].  Each model has zeros in place of
the other's separate units; its own compute twice what they did, so that the mean of both models has them as they were,
and what reads them reads half of each (PLeaS, arXiv:2407.02447, before least squares).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import SymmetryGroup
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.small import parse_json
from weightsmith.io.read.source import Block, Source
from weightsmith.io.read.views import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Halves", "WidenedSource", "widened_config"]

_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim")
"""What config.json calls the number of hidden units of an MLP."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Units of a group: merged [2, k] and separate [2, m] int64 of both models; see `align.partial.Split`.

    The last axis of the group is that of the matrix that reads its units, see `align.layout`.
    """

    group: SymmetryGroup
    merged: np.ndarray
    separate: np.ndarray

    @property
    def width(self) -> int:
        """Units in the result."""
        return int(self.merged.shape[1] + 2 * self.separate.shape[1])

    def index(self, model: int) -> np.ndarray:
        """[width]: the unit of a model at each place of the result, -1 where it has none."""
        nothing = np.full(self.separate.shape[1], -1)
        own = [self.separate[model] if i == model else nothing for i in (0, 1)]
        return np.concatenate([self.merged[model], *own])


class WidenedSource(View):
    """See the module's text; model: 0 of the reference, 1 of the moving model.

    Raises SourceError where config.json cannot say the new width.
    """

    shows = "widened"

    def __init__(self, source: Source, halves: Iterable[Halves], model: int) -> None:
        super().__init__(source)
        self.model = model
        self._wide: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
        keys = dict(self.keys)
        widths: set[tuple[int, int]] = set()
        for half in halves:
            index = half.index(model)
            widths.add((half.group.size, half.width))
            for number, axis in enumerate(half.group.axes):
                reads = number == len(half.group.axes) - 1
                factor = np.where(index < 0, 0, 1 if reads else 2)
                factor[: half.merged.shape[1]] = 1
                # both halves of a fused gate_up, one behind the other
                places = np.concatenate([np.maximum(index, 0) + i * half.group.size for i in range(axis.outer)])
                shape = list(keys[axis.name].shape)
                shape[axis.axis] = len(places)
                keys[axis.name] = Key(axis.name, tuple(shape), keys[axis.name].dtype)
                self._wide[axis.name] = (axis.axis, places, np.tile(factor, axis.outer))
        self.keys = keys
        if (text := config_of(source)) is not None:
            self.origin = replace(self.origin, config=widened_config(text, widths, str(source)))
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def computes(self, name: str) -> bool:
        return self.key(name).name in self._wide or super().computes(name)

    def read_cost(self, name: str) -> float:
        return super().read_cost(name) + (3.0 if self.key(name).name in self._wide else 0.0)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if key.name not in self._wide:
            return super().block(name, low, high, into)
        axis, places, factor = self._wide[key.name]
        if axis == 0:
            places, factor = places[low:high], factor[low:high]
            found = self._whole(key.name)[torch.from_numpy(places)]
        else:
            found = self.source.read(key.name, low, high).index_select(axis, torch.from_numpy(places))
        shape = [1] * found.ndim
        shape[axis] = len(factor)
        return found * torch.from_numpy(factor).reshape(shape).to(found.dtype)

    def _whole(self, name: str) -> Tensor:
        """The tensor last read: a reader goes through it block by block."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = (name, self.source.read(name))
            return self._last[1]


def widened_config(text: str, widths: Iterable[tuple[int, int]], label: str) -> str:
    """config.json with another number of hidden units; widths: (before, after), which must be one pair.

    Raises SourceError where no field says it, or MLPs are not all of one width.
    """
    found = set(widths)
    if len(found) != 1:
        raise SourceError(f"{label}: its MLPs are not all of one width, and config.json has one field for all of them")
    ((before, after),) = found
    config = parse_json(text.encode(errors="surrogateescape"), f"{label}: config.json")
    changed = False
    for scope in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in _FIELDS:
            default = name == "n_inner" and name in scope and scope[name] is None and scope.get("n_embd") == before / 4
            if scope.get(name) == before or default:
                scope[name] = after
                changed = True
    if not changed:
        raise SourceError(f"{label}: config.json has no field that says {before} hidden units, so none can say {after}")
    return json.dumps(config, indent=2) + "\n"
