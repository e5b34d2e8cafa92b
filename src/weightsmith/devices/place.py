"""Where the arithmetic of a task happens, and how numbers come there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.keys import DTYPES
from weightsmith.core.lazy import torch
from weightsmith.core.task import block_size, blocks
from weightsmith.devices.accelerator import Accelerator
from weightsmith.io.read.source import Bits, Source, tensor_to_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CPU", "Lane", "Place", "Plain"]


class Place(ABC):
    """Rows of a source become float tensors of `device` here, and results bits of the host.

    block   elements per block of a merge; None: as in measuring passes.  Changes no byte of the result
    """

    device: str
    block: int | None

    @abstractmethod
    def measured(self, inputs: int) -> int:
        """Elements per block of a measuring pass."""

    @abstractmethod
    def fill(self, target: Tensor, source: Source, name: str, start: int, stop: int) -> None:
        """Write rows start..stop of a tensor into `target`, in its dtype."""

    def load(self, source: Source, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start..stop of a tensor; never written to, as it may be the source's own memory."""
        key = source.key(name)
        made = torch.empty((stop - start, *key.shape[1:]) if key.shape else (), dtype=dtype, device=self.device)
        self.fill(made, source, name, start, stop)
        return made

    @abstractmethod
    def bring(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the host."""

    @abstractmethod
    def fetch(self, value: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """A result as (first row, bits) in row order; what was handed out is used before the next is asked for."""


@dataclass(frozen=True)
class Plain(Place):
    """Read, copied and waited for, one after the other; picklable."""

    device: str = "cpu"
    block = None

    def measured(self, inputs: int) -> int:
        return block_size(inputs)

    def fill(self, target: Tensor, source: Source, name: str, start: int, stop: int) -> None:
        key = source.key(name)
        if not key.shape or source.computes(name):
            target.copy_(source.read(name, start, stop))
            return
        for low, high in blocks(key, start, stop):  # no second copy of a whole matrix
            target[low - start : high - start].copy_(source.read(name, low, high))

    def load(self, source: Source, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if getattr(torch, source.key(name).dtype) == dtype:  # nothing to convert, so nothing to copy
            return source.read(name, start, stop).to(self.device)
        return super().load(source, name, start, stop, dtype)

    def bring(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(self.device, dtype)

    def fetch(self, value: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        return _drained(deque([(0, tensor_to_bits(value.cpu()))]))


CPU = Plain()


def _drained(pieces: deque[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    while pieces:
        yield pieces.popleft()  # no name for it: a merged tensor would live on while other variants have their turn


class Lane(Place):
    """One task at a time on one device, with staging memory and a stream of its own.

    While the bytes of one piece are copied to the device from one buffer, those of the next are read into the other.
    Lanes work side by side: one reads, another computes, a third one's result is written.  Numbers travel as they
    are stored and become float32 on the device.

    stage  bytes of each of the three buffers: two on the way in, one on the way out
    block  see `Place`; becomes smaller where the device has run out of memory
    """

    BUFFERS = 3
    block: int

    def __init__(self, accelerator: Accelerator, device: str, stage: int, block: int) -> None:
        self.device, self.block = device, block
        self._accelerator = accelerator
        self._stream = accelerator.stream(device)
        self._in = [accelerator.staging(stage) for _ in range(2)]
        self._out = accelerator.staging(stage)
        self._sent: list[Any] = [None, None]
        self._turn = 0

    def using(self) -> AbstractContextManager[None]:
        """Work inside goes to this lane's device and stream."""
        return self._accelerator.using(self.device, self._stream)

    def measured(self, inputs: int) -> int:
        return self._accelerator.measured(inputs)

    def fill(self, target: Tensor, source: Source, name: str, start: int, stop: int) -> None:
        key = source.key(name)
        item = DTYPES[key.dtype].itemsize
        if source.computes(name) or key.row_numel * item > self._out.numel():
            self._send(target, source.read(name, start, stop))
            return
        for low, high in self._pieces(start, stop, key.row_numel * item):
            shape = (high - low, *key.shape[1:]) if key.shape else ()
            staged = self._buffer(shape, getattr(torch, key.dtype))
            _read_into(tensor_to_bits(staged), source, name, low, high)
            self._copy(target[low - start : high - start] if key.shape else target, staged)

    def bring(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        made = torch.empty(value.shape, dtype=dtype, device=self.device)
        self._send(made, value)
        return made

    def fetch(self, value: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        value = value.contiguous()
        rows, width = (value.shape[0], value[0].nbytes if value.numel() else 0) if value.ndim else (1, value.nbytes)
        if width > self._out.numel():  # not even a row has room in the buffer
            yield 0, tensor_to_bits(value.cpu())
            return
        for low, high in self._pieces(0, rows, width):
            piece = value[low:high] if value.ndim else value
            staged = _typed(self._out, tuple(piece.shape), piece.dtype)
            self._accelerator.copy_out(staged, piece)
            self._accelerator.wait(self._accelerator.mark())
            yield low, tensor_to_bits(staged)

    def _send(self, target: Tensor, value: Tensor) -> None:
        """Copy a tensor of the host, piece by piece."""
        width = value[0].nbytes if value.ndim and value.numel() else value.nbytes
        if width > self._out.numel():
            target.copy_(value.to(self.device))
            return
        for low, high in self._pieces(0, value.shape[0] if value.ndim else 1, width):
            piece = value[low:high] if value.ndim else value
            staged = self._buffer(tuple(piece.shape), piece.dtype)
            staged.copy_(piece)
            self._copy(target[low:high] if value.ndim else target, staged)

    def _pieces(self, start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
        """Rows start..stop in as many as fit into a buffer, `width` bytes each."""
        step = self._out.numel() // max(width, 1)
        for low in range(start, stop, step):
            yield low, min(low + step, stop)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer whose last contents have arrived on the device, as a tensor."""
        self._turn = 1 - self._turn
        if self._sent[self._turn] is not None:
            self._accelerator.wait(self._sent[self._turn])
        return _typed(self._in[self._turn], shape, dtype)

    def _copy(self, target: Tensor, staged: Tensor) -> None:
        arrived = target
        if staged.dtype != target.dtype:  # torch would convert on the host, and send twice the bytes
            arrived = torch.empty(staged.shape, dtype=staged.dtype, device=self.device)
        self._accelerator.copy_in(arrived, staged)
        self._sent[self._turn] = self._accelerator.mark()
        if arrived is not target:
            target.copy_(arrived)


def _read_into(memory: np.ndarray, source: Source, name: str, low: int, high: int) -> None:
    """Put stored rows into memory that is there; sources that can read straight into it copy nothing."""
    found = source.block(name, low, high, memory)
    assert isinstance(found, Bits)  # asked for tensors only that are not calculated
    if found.array is not memory:
        memory[...] = found.array


def _typed(buffer: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The beginning of a buffer of bytes as a tensor."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return buffer[:count].view(dtype).reshape(shape)
