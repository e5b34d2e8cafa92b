"""Where tensors come from: read-only maps from name to tensor, read whole or by rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError, did_you_mean
from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Beside", "MemorySource", "Source", "bits_to_tensor", "holds_nonfinite", "tensor_to_bits"]


@dataclass(frozen=True)
class Beside:
    """What an adapter brings along besides its changes to the base's tensors.

    folder  its own: tokenizer, chat template, modules of Sentence-Transformers
    says    what the user should know
    heads   tensors of a trained head that the base does not have
    """

    folder: Path | None = None
    says: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Source(ABC):
    """A read-only map name -> tensor.  Listing keys reads headers only.

    label    how messages call it (a path, a hub id, a model's name)
    keys     name -> Key, in a fixed order; a tied tensor is listed once
    aliases  tied name -> the listed name that holds its data
    folder   where its config, tokenizer and companion files lie, if anywhere

    A source must survive pickling (file-backed ones reopen themselves).
    Views (LoRA on a base, a layer slice, a nested merge) are sources too.
    """

    label: str
    keys: Mapping[str, Key]
    aliases: Mapping[str, str] = {}
    folder: Path | None = None
    weight_files: Collection[str] = ()
    """Names, relative to `folder`, of the files that hold its tensors."""
    download_bytes: int = 0
    """What `prepare` will still have to download."""
    held_bytes: int = 0
    """What it keeps in memory for as long as it is read, beside what single reads take."""
    computed: bool = False
    """True where values are calculated on reading: `bits` is then not available, and `read` may return
    a wider dtype than `keys` states.  A view that calculates some tensors only says so in `computes`."""
    stacks: tuple[str, ...] = ()
    """The stacks of blocks ('model.layers') that it is a slice of; none for a whole model."""
    beside: Beside | None = None
    """What an adapter brought along; None for models."""
    pinned: Collection[str] = ()
    """Names of tensors that only the first block has, whichever block that is (T5's relative positions)."""

    @abstractmethod
    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop of a tensor as stored, as unsigned integers of its item size: [rows, *rest].

        A 0-dim tensor gives shape [].  No conversion, no torch.
        """

    def read_into(self, out: np.ndarray, name: str, start: int = 0, stop: int | None = None) -> None:
        """What `bits` returns, into memory that is there: contiguous, of that shape and item size."""
        out[...] = self.bits(name, start, stop)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a tensor on the CPU, in its stored dtype."""
        return bits_to_tensor(self.bits(name, start, stop), self.key(name).dtype)

    def key(self, name: str) -> Key:
        try:
            return self.keys[self.aliases.get(name, name)]
        except KeyError:
            raise SourceError(f"{self.label}: no tensor {name!r}{did_you_mean(name, self.keys)}") from None

    def computes(self, name: str) -> bool:
        """Whether this tensor is calculated on reading (`read` only), rather than stored (`bits` too)."""
        return self.computed

    def factors(self, name: str, base: Source) -> tuple[Tensor, Tensor] | None:
        """(left [rows, r], right [r, columns]) where a tensor is exactly `base`'s plus left @ right, else None."""
        return None

    def rank(self, name: str, base: Source) -> int | None:
        """r of `factors`, known without reading; None where there are none."""
        return None

    def prepare(self) -> None:  # noqa: B027  (nothing to do for most sources)
        """Fetch what is not on this machine yet.  Planning works without; the first `bits` or `read` does it too."""

    def config_text(self) -> str | None:
        """config.json as it has to be for these tensors, where that is not what lies in `folder`."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data without reading it all: files, sizes, times, hashes of headers and samples.

        Empty in memory.  `inputs.opened` adds hashes of all bytes where they are asked for.

        Raises SourceError if a file is no longer the one that was opened.
        """
        return {}

    def places(self) -> tuple[Path, ...]:
        """Every folder and file that it reads, so that no result is written over one of them.

        Files that hold tensors are among them, unless they are the hub's (whose hashes the hub knows).  A URL
        stands among them as pathlib writes it (s3:/bucket/x), where no path of this machine is.
        """
        own = getattr(self, "path", None)
        return tuple(Path(place) for place in (self.folder, own) if place is not None)

    def read_cost(self, name: str) -> float:
        """Extra bytes held while reading, per byte of float32 result (views override it)."""
        return 0.0


_FIELDS = {  # dtype -> exponent mask; a number with all of these bits set is NaN or Inf
    "float64": 0x7FF0000000000000,
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,  # it has no Inf, and one NaN of either sign
}


def holds_nonfinite(bits: np.ndarray, dtype: str) -> bool:
    """Whether any stored number of a floating dtype is NaN or Inf; no torch."""
    field = bits.dtype.type(_FIELDS[dtype])
    return bool((bits & field).max(initial=0) == field)  # not any(... == field): twice the time


def bits_to_tensor(bits: np.ndarray, dtype: str) -> Tensor:
    """View stored bits as a tensor of the named torch dtype (no copy)."""
    if not bits.flags.writeable:
        bits = bits.copy()  # torch cannot hold read-only memory
    return torch.from_numpy(bits).view(getattr(torch, dtype))


def tensor_to_bits(tensor: Tensor) -> np.ndarray:
    """View a CPU tensor's memory as unsigned integers of its item size (no copy if contiguous)."""
    tensor = tensor.detach().contiguous()
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[tensor.element_size()]
    array: np.ndarray = tensor.view(unsigned).numpy()
    return array


class MemorySource(Source):
    """Tensors that are already in memory: a state dict, or an `nn.Module`'s."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "tensors in memory") -> None:
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        keys: dict[str, Key] = {}
        aliases: dict[str, str] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise SourceError(f"{label}: {name} has dtype {dtype}, which cannot be merged or stored")
            if tensor.numel():
                place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)
                if place in seen:
                    aliases[name] = seen[place]
                    continue
                seen[place] = name
            self._tensors[name] = tensor.detach()
            keys[name] = Key(name, tuple(tensor.shape), dtype)
        self.keys, self.aliases = keys, aliases

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return tensor_to_bits(self.read(name, start, stop))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._tensors[self.key(name).name]
        if tensor.ndim and (start or stop is not None):
            tensor = tensor[start:stop]
        return tensor.cpu()
