"""Linear maps of the units on one axis of a tensor: what a change of basis inside a layer does to its weights.

A head whose values are v' = B v has its rows of W_V multiplied by B and its columns of W_O by B^-1, that is, every
row of W_O, cut to the head, by B^-T.  So all of it is one thing: units of an axis, each multiplied by a small matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Turn", "apply_turns", "by_tensor", "inverse", "turned"]


@dataclass(frozen=True, eq=False)
class Turn:
    """Units of `width` entries on one axis of a tensor: the first begins at entry `start`, then one `every` so many.

    every   0: one behind the other
    blocks  [units, width, width] float64: unit i becomes blocks[i] @ unit i; [units] scales units of one entry
    plus    of weights that stand for w + plus, as gains of Gemma's norms do: w becomes blocks (w + plus) - plus
    """

    name: str
    axis: int
    start: int
    blocks: np.ndarray
    every: int = 0
    plus: float = 0.0

    @property
    def width(self) -> int:
        return 1 if self.blocks.ndim == 1 else int(self.blocks.shape[-1])

    @cached_property
    def partners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Of matrices whose rows have one entry beside the diagonal's at most, as in pairs: which, [width], and both.

        The factors are [units, width] each.  None where rows are fuller.
        """
        if self.blocks.ndim == 1:
            return None
        same = np.eye(self.width, dtype=bool)
        others = (self.blocks != 0).any(axis=0) & ~same
        if (others.sum(axis=1) > 1).any():
            return None
        which = np.where(others.any(axis=1), others.argmax(axis=1), np.arange(self.width))
        entries = np.arange(self.width)
        alone = np.ascontiguousarray(self.blocks[:, entries, entries])
        return which, alone, np.where(which == entries, 0.0, self.blocks[:, entries, which])

    @property
    def step(self) -> int:
        """From the start of a unit to that of the next."""
        return self.every or self.width

    @property
    def stop(self) -> int:
        """The entry behind the last unit."""
        return self.start + (len(self.blocks) - 1) * self.step + self.width

    def around(self, low: int, high: int) -> tuple[int, int]:
        """The range low..high of entries, made so large that no unit is cut."""
        cut = (low - self.start) % self.step
        if self.start < low < self.stop and cut < self.width:
            low -= cut
        cut = (high - self.start) % self.step
        if self.start < high < self.stop and 0 < cut < self.width:
            high += self.width - cut
        return low, high


def inverse(turn: Turn) -> Turn:
    """What takes a turn back."""
    return replace(turn, blocks=1 / turn.blocks if turn.blocks.ndim == 1 else np.linalg.inv(turn.blocks))


def turned(tensor: Tensor, turn: Turn, first: int = 0) -> None:
    """Multiply units of a tensor in place; entry 0 of the turn's axis here is entry `first` of the whole.

    tensor: floating, no unit of it may be cut.  The matrices are taken in its dtype.
    """
    size = tensor.shape[turn.axis]
    one = max(0, -(-(first - turn.start) // turn.step))  # the first unit that begins here
    count = min(len(turn.blocks), (first + size - turn.start - turn.width) // turn.step + 1) - one
    if count <= 0:
        return
    blocks = torch.from_numpy(np.ascontiguousarray(turn.blocks[one : one + count])).to(tensor.dtype)
    here = turn.start + one * turn.step - first
    part = tensor.narrow(turn.axis, here, (count - 1) * turn.step + turn.width)
    if turn.plus:
        part += turn.plus
    if turn.blocks.ndim == 1:
        shape = [1] * tensor.ndim
        shape[turn.axis] = -1
        every = [slice(None)] * turn.axis + [slice(None, None, turn.step)]
        part[tuple(every)] *= blocks.reshape(shape)
    else:
        units = part.unfold(turn.axis, turn.width, turn.step)  # [.., units, .., width]
        moved = units.movedim(turn.axis, 0)
        flat = moved.reshape(count, -1, turn.width)
        if turn.partners is not None:
            alone, other = (torch.from_numpy(own[one : one + count, None]).to(tensor) for own in turn.partners[1:])
            made = flat.mT.index_select(1, torch.from_numpy(turn.partners[0])).mT * other
            moved.copy_(made.addcmul_(flat, alone).reshape(moved.shape))
        elif turn.axis == 0:  # rows stay rows: nothing is transposed in memory
            moved.copy_((blocks @ flat.mT).mT.reshape(moved.shape))
        else:
            moved.copy_((flat @ blocks.mT).reshape(moved.shape))
    if turn.plus:
        part -= turn.plus


def by_tensor(turns: Iterable[Turn]) -> dict[str, tuple[Turn, ...]]:
    """Tensor -> its turns, in their order."""
    found: dict[str, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.name, []).append(turn)
    return {name: tuple(own) for name, own in found.items()}


def apply_turns(tensors: Mapping[str, Tensor], turns: Iterable[Turn]) -> dict[str, Tensor]:
    """Whole tensors with some of them turned, those in float64."""
    found = dict(tensors)
    for name, own in by_tensor(turns).items():
        found[name] = found[name].to(torch.float64, copy=True)
        for turn in own:
            turned(found[name], turn)
    return found
