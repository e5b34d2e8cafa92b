"""What the engine asks of a device: how much memory is free, staging memory, copies, and when they have ended.

Cuda   NVIDIA and AMD GPUs, through torch.cuda
Host   the CPU in the part of a device: the same path (lanes, staging, order, errors) without streams; it gives
       the CPU's bytes, so everything but the copies themselves can be proven where there is no GPU
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.lazy import torch
from weightsmith.core.task import block_size

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Accelerator", "Cuda", "Host", "accelerator_of"]


class Accelerator(ABC):
    """One or several devices of one kind.  Picklable; what belongs to a running process is made by the methods.

    kind      what messages and weightsmith.json call it
    exact     whether results are the CPU's to the last bit
    resident  bytes of this process's memory that the device's libraries take
    """

    kind: str
    exact: bool = False
    resident: int = 0

    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """torch's names of the devices to use; one may occur twice, it is then two."""

    @abstractmethod
    def free(self, device: str) -> int | None:
        """Bytes of its memory that nobody uses; None: no bound."""

    @abstractmethod
    def staging(self, nbytes: int) -> Tensor:
        """Host memory that the device can copy from and to by itself: uint8 [nbytes]."""

    @abstractmethod
    def stream(self, device: str) -> Any:
        """Something in which work is done in order, side by side with that in other streams."""

    @abstractmethod
    def using(self, device: str, stream: Any) -> AbstractContextManager[None]:
        """What this thread does inside goes to the device, into the stream."""

    @abstractmethod
    def copy_in(self, target: Tensor, staged: Tensor) -> None:
        """Begin to copy staging memory to a tensor of the same dtype and shape on the device."""

    @abstractmethod
    def copy_out(self, staged: Tensor, value: Tensor) -> None:
        """Begin to copy a tensor of the device to staging memory."""

    @abstractmethod
    def mark(self) -> Any:
        """The end of all that this thread's stream has been given so far."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Until the stream has come to the mark."""

    @abstractmethod
    def settle(self, device: str) -> None:
        """Until all work has ended; then give memory that is kept for later back to the device."""

    @abstractmethod
    def ran_out(self, error: BaseException) -> bool:
        """Whether an error says that the device's memory was not enough."""

    def measured(self, inputs: int) -> int:
        """Elements per block of a measuring pass: no setting, as what is added up there has its order."""
        return block_size(inputs)


@dataclass(frozen=True)
class Cuda(Accelerator):
    """GPUs that torch.cuda knows, by their names ('cuda:0')."""

    names: tuple[str, ...]
    kind = "cuda"
    resident = 700_000_000  # an estimate: never measured by the authors

    def devices(self) -> tuple[str, ...]:
        return self.names

    def free(self, device: str) -> int | None:
        found: int = torch.cuda.mem_get_info(device)[0]
        return found

    def staging(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def stream(self, device: str) -> Any:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def using(self, device: str, stream: Any) -> Iterator[None]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    def copy_in(self, target: Tensor, staged: Tensor) -> None:
        target.copy_(staged, non_blocking=True)

    def copy_out(self, staged: Tensor, value: Tensor) -> None:
        staged.copy_(value, non_blocking=True)

    def mark(self) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def settle(self, device: str) -> None:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()

    def ran_out(self, error: BaseException) -> bool:
        # cuBLAS and cuSOLVER take memory of their own and say so in words.
        return isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and "ALLOC_FAILED" in str(error)
        )

    def measured(self, inputs: int) -> int:
        return 16 * block_size(inputs)  # a kernel's start costs as much as some 100,000 additions


@dataclass(frozen=True)
class Host(Accelerator):
    """The CPU as `count` devices with `memory` bytes free on each (None: no bound)."""

    count: int = 1
    memory: int | None = None
    kind = "host"
    exact = True

    def devices(self) -> tuple[str, ...]:
        return ("cpu",) * self.count

    def free(self, device: str) -> int | None:
        return self.memory

    def staging(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self, device: str) -> Any:
        return None

    def using(self, device: str, stream: Any) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def copy_in(self, target: Tensor, staged: Tensor) -> None:
        target.copy_(staged)

    def copy_out(self, staged: Tensor, value: Tensor) -> None:
        staged.copy_(value)

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        """Copies have ended when they return."""

    def settle(self, device: str) -> None:
        """Nothing goes on by itself."""

    def ran_out(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)


def accelerator_of(device: str | Accelerator) -> Accelerator | None:
    """What `--device` means: None is the plain CPU.

    auto and cpu  the CPU, whose bytes are the same everywhere; a GPU is used where it is named
    cuda          every GPU that torch sees
    cuda:1        that one

    Raises WeightsmithError where there is no such GPU.
    """
    if isinstance(device, Accelerator):
        return device
    if device in ("auto", "cpu"):
        return None
    import torch  # itself: its stand-in has no __version__

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise WeightsmithError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    names = tuple(f"cuda:{i}" for i in range(count))
    if device != "cuda" and device not in names:
        raise WeightsmithError(f"--device {device}: torch sees {', '.join(names)}; name one of them, or cuda for all")
    return Cuda(names if device == "cuda" else (device,))
