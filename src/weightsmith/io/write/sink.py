"""Where finished blocks go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weightsmith.core.errors import OutputError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.io.read.source import bits_to_tensor
from weightsmith.io.write.aside import Aside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MemorySink", "Sink"]


class Sink(ABC):
    """Takes finished blocks at known places, in any order, from several threads.

    `begin` fixes every offset; a task writes its blocks and then reports itself `done`, with what
    a resumed run and the manifest need to know of it; `finish` makes the result visible.

    noted  whether anybody reads the records of tasks; where nobody does, nothing is hashed or sampled for them
    """

    noted: ClassVar[bool] = True

    @abstractmethod
    def begin(self, keys: Sequence[Key]) -> None:
        """Lay out the output.  Nothing is visible under its final name before `finish`."""

    @abstractmethod
    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Store rows of a tensor, as unsigned integers of the output dtype's item size, from row `start`."""

    def room(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Where rows of a tensor may be made before they are handed to `write`; None: in an array of their own."""
        return None

    def completed(self) -> Mapping[str, Any]:
        """Task id -> record of the tasks that an earlier run has finished (resume)."""
        return {}

    def done(self, task: str, record: Mapping[str, Any]) -> None:  # noqa: B027  (nothing to note in memory)
        """A task's blocks are all written; the record says what they hash to."""

    def files_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Files that one process has to write as a whole, of those that some tensors go to; none where rows do."""
        return ()

    def writer(self) -> Sink:
        """What another process writes through: picklable, its `done` makes a task's bytes durable.  After `begin`."""
        raise OutputError(f"{type(self).__name__} takes blocks from one process only")

    def aside(self) -> Aside | None:
        """Where a run may note what it would otherwise find out again; None: nowhere.  After `begin`."""
        return None

    def abort(self) -> None:  # noqa: B027  (nothing to release in memory)
        """The run failed: leave what can be resumed, release files and locks."""


class MemorySink(Sink):
    """Collects the result as a dict of tensors.

    spare  buffers of an earlier result, by tensor name: taken out and used again where they fit
    """

    noted = False

    def __init__(self, spare: dict[str, np.ndarray] | None = None) -> None:
        self.bits: dict[str, np.ndarray] = {}
        self._keys: dict[str, Key] = {}
        self._spare = {} if spare is None else spare

    def begin(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._keys[key.name] = key
            kind, old = f"u{DTYPES[key.dtype].itemsize}", self._spare.pop(key.name, None)
            fits = old is not None and (old.shape, old.dtype) == (key.shape, np.dtype(kind))
            self.bits[key.name] = old if old is not None and fits else np.empty(key.shape, kind)

    def room(self, name: str, start: int, stop: int) -> np.ndarray:
        target = self.bits[name]
        return target[start:stop] if target.ndim else target

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        target = self.room(name, start, start + bits.shape[0] if bits.ndim else 1)
        if target.ctypes.data != bits.ctypes.data:  # made in place otherwise
            target[...] = bits

    def aside(self) -> Aside:
        return Aside()  # a bit for each entry and expert, where the result has 16 or 32

    def tensors(self) -> dict[str, Tensor]:
        """The finished tensors, by name."""
        return {name: bits_to_tensor(bits, self._keys[name].dtype) for name, bits in self.bits.items()}
