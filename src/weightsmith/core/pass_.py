"""Measuring passes: frozen values that make a small, typed result of all blocks of a tensor or of a model.

A method says which passes it wants (`Stage.passes`) and finds their results by the same values (`Site.result`).  The
engine sees every block, adds up what it saw in a fixed order, and measures equal passes of a sweep's variants once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from weightsmith.core.kernel import Look
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.core.site import Site

__all__ = ["Found", "Pass", "Rows", "Scope", "State", "Totals", "fold", "measured"]

R = TypeVar("R")


class Scope(Enum):
    """Over what a pass adds up."""

    TENSOR = "tensor"
    MODEL = "model"


class Rows(NamedTuple):
    """A value with one entry per row on its last axis: blocks are joined, not added."""

    values: Any  # a tensor or an array


State = Mapping[str, "Tensor | Rows"]
"""What is seen of a block, by name: integer counts, float64 sums, or `Rows`; new ones, for the engine adds to them."""


@dataclass(frozen=True)
class Pass(ABC, Generic[R]):
    """One look, or several after each other, at all blocks of a tensor (of all tensors: scope MODEL).

    whole     whether it must see a whole tensor at once
    factored  whether it takes low-rank task vectors as products (`Site.factors`), which are whole tensors
    slope     for the gradient pass, to which results are constants.  'flat': the result is constant almost everywhere,
              or only choices hang on it (ranks, signs); 'own': the method itself derives it by its own parameters;
              '': neither, so that nothing it depends on may be a tensor
    """

    whole: ClassVar[bool] = False
    factored: ClassVar[bool] = False
    slope: ClassVar[str] = ""

    scope: Scope = field(default=Scope.TENSOR, kw_only=True)

    @abstractmethod
    def see(self, site: Site) -> State:
        """Observe one block; earlier passes' results are in `site`."""

    def end(self, total: Mapping[str, Any]) -> R | Pass[R]:
        """Turn what all blocks add up to into the result, or into the next look."""
        found: R = next(iter(total.values()))
        return found

    @property
    def rounds(self) -> int:
        """How many looks it takes at most."""
        return 1

    @property
    def seen(self) -> Hashable:
        """What `see` depends on besides the site: passes for which it is equal share a look, whatever they end in."""
        return self

    def tells(self, result: R) -> Mapping[str, float]:
        """Figures of the result that the stage's `says` is to be told, as `Site.tell` tells those of a merge."""
        return {}

    def applies(self, key: Key) -> bool:
        """Whether there is something to measure on this tensor; else it has no result there."""
        return True

    @property
    def kernel(self) -> Look | None:
        """How the kernels see the same, if they can."""
        return None


Found = Mapping[Pass[Any], Any]
"""The results of a stage's passes."""


def measured(wanted: Pass[R], look: Callable[[Pass[R]], Mapping[str, Any]]) -> R:
    """Take all looks of a pass; `look` sees every block and adds up."""
    current = wanted
    while True:
        found = current.end(look(current))
        if not isinstance(found, Pass):
            return found
        current = found


# --- adding up -----------------------------------------------------------------------------------


class Totals:
    """States, added up as they come: a histogram per block of a large tensor would be a gigabyte."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._joined: dict[str, _Joined] = {}

    def add(self, state: Mapping[str, Any], into: bool = False) -> None:
        """`into`: counts are added to where the first ones lie, which belong to nobody else."""
        for name, value in state.items():
            if isinstance(value, Rows):
                self._joined.setdefault(name, _Joined()).add(value.values)
            elif name not in self._sums:
                self._sums[name] = value
            elif into and isinstance(value, torch.Tensor) and value.dtype == torch.int64:
                self._sums[name] += value
            else:
                self._sums[name] = _sum(self._sums[name], value)

    def result(self) -> dict[str, Any]:
        """Sums, and as `Rows` what was joined."""
        return {**self._sums, **{name: Rows(values.result()) for name, values in self._joined.items()}}


class _Joined:
    """Tensors (or arrays), joined on their last axis as they come, in a buffer that doubles when it is full.

    Kept one by one they would lie between the large blocks that are freed around them: the holes in the heap of a
    tensor of 4096 blocks were a gigabyte.
    """

    def __init__(self) -> None:
        self._buffer: Any = None
        self._filled = 0

    def add(self, values: Any) -> None:
        end = self._filled + values.shape[-1]
        if self._buffer is None:
            self._buffer, self._filled = values, end
            return
        if end > self._buffer.shape[-1]:
            shape, old = (*self._buffer.shape[:-1], 2 * end), self._buffer
            self._buffer = np.empty(shape, old.dtype) if isinstance(old, np.ndarray) else old.new_empty(shape)
            self._buffer[..., : self._filled] = old[..., : self._filled]
        plain = isinstance(self._buffer, np.ndarray)
        self._buffer[..., self._filled : end] = np.asarray(values) if plain else torch.as_tensor(values)
        self._filled = end

    def result(self) -> Any:
        whole = self._buffer[..., : self._filled]
        return np.ascontiguousarray(whole) if isinstance(whole, np.ndarray) else whole.contiguous()


def fold(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add equal names up in the order given; `Rows` are joined on their last axis.  Values: tensors or arrays."""
    totals = Totals()
    for state in states:
        totals.add(state)
    return {name: value.values if isinstance(value, Rows) else value for name, value in totals.result().items()}


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, (np.ndarray, np.generic)) != isinstance(b, (np.ndarray, np.generic)):
        return np.asarray(a) + np.asarray(b)  # one tensor went through the kernels, the other did not
    return a + b
