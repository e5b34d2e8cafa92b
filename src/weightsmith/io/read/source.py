"""Where tensors come from: read-only maps from name to tensor, read whole or by rows."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from weightsmith.core.errors import SourceError, did_you_mean
from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DIFFUSION",
    "Bits",
    "Block",
    "Cost",
    "Cut",
    "LowRank",
    "MemorySource",
    "Origin",
    "Source",
    "beside_config",
    "bits_to_tensor",
    "holds_nonfinite",
    "numbers",
    "quick_rows",
    "stores_of",
    "tensor_to_bits",
]  # fmt: skip


DIFFUSION = "diffusion_pytorch_model"
"""How diffusers calls a component's weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """Rows as they are stored.

    array  unsigned integers of the item size: [rows, *rest], or [] of a 0-dim tensor
    dtype  what they spell
    """

    array: np.ndarray
    dtype: str

    def tensor(self) -> Tensor:
        """The same memory as a tensor."""
        return bits_to_tensor(self.array, self.dtype)


Block: TypeAlias = "Bits | Tensor"
"""Rows of a tensor: as stored, or calculated (then perhaps in a wider dtype than its key states)."""


@dataclass(frozen=True)
class Cost:
    """What reading a source takes beside its bytes.

    download  bytes that `prepare` will still have to fetch
    held      bytes kept in memory for as long as it is read, beside what single reads take
    seconds   of calculating all of it once (nested merges)
    """

    download: int = 0
    held: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.download + other.download, self.held + other.held, self.seconds + other.seconds)


@dataclass(frozen=True)
class Cut:
    """Which blocks of a model were taken.

    stacks  the stacks of blocks ('model.layers') that it is a slice of
    pinned  names of tensors that only the first block has, whichever block that is (T5's relative positions)
    """

    stacks: tuple[str, ...] = ()
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Origin:
    """Where a source's tensors come from, and what lies beside them.

    label      how messages call it (a path, a hub id, a model's name)
    folder     where its config, tokenizer and companion files lie, if anywhere
    files      names, relative to `folder`, of the files that hold its tensors
    locations  every folder and file that is read, so that no result is written over one of them.  Files with tensors
               are among them unless they are the hub's (whose hashes the hub knows).  A URL stands there as pathlib
               writes it (s3:/bucket/x), where no path of this machine is
    config     config.json as it has to be for these tensors, where that is not what lies in `folder`
    checkpoint  the folder that training wrote (tokenizer, trainer_state.json): an adapter's own, not its base's
    heads      tensors of a trained head that an adapter brought and the base does not have
    metadata   what its file says of itself (statistics)
    remarks    what a plan says about it, a line each
    lacks      what a plan says where it is the first model, whose config and tokenizer go along, and has none
    cost       beside the bytes of its tensors
    cut        of a slice of a model
    stores     beginning of tensors' names -> how the names of the files begin that hold them, relative to `folder`;
               empty: all in model.safetensors or its shards
    made_of    of a model that is put together of others, or merged of them: theirs
    numbering  how its rows are numbered, where not as the tokenizer in `folder` does: a `tokens.numbering.Numbering`
    """

    label: str
    folder: Path | None = None
    files: tuple[str, ...] = ()
    locations: tuple[Path, ...] = ()
    config: str | None = None
    checkpoint: Path | None = None
    heads: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    lacks: str = ""
    cost: Cost = Cost()
    cut: Cut = Cut()
    stores: Mapping[str, str] = field(default_factory=dict)
    made_of: tuple[Origin, ...] = ()
    numbering: Any = None

    def parts(self, name: str) -> dict[str, Origin]:
        """The models that a model called `name` is made of in the end, each folder once: 'joined, part 2 (math)'."""
        if not self.made_of:
            return {name: self}
        leaves = self._leaves().values()
        return {f"{name}, part {i} ({leaf.place.rpartition('/')[2]})": leaf for i, leaf in enumerate(leaves, 1)}

    @property
    def place(self) -> str:
        """The label without the layers of a slice."""
        return re.sub(r"\[[^]]*\]$", "", self.label).rstrip("/")

    def _leaves(self) -> dict[Path | str, Origin]:
        found: dict[Path | str, Origin] = {}
        for origin in self.made_of:
            found |= origin._leaves()
        return found or {self.folder or self.place: self}

    def beside(self, *others: Origin, **changes: Any) -> Origin:
        """This one, whose tensors come from others too: all that is read, and what that takes, counts."""
        every = (self, *others)
        locations = tuple(dict.fromkeys(location for origin in every for location in origin.locations))
        remarks = tuple(dict.fromkeys(remark for origin in every for remark in origin.remarks))
        cost = sum((origin.cost for origin in others), self.cost)
        return replace(self, **{"locations": locations, "remarks": remarks, "cost": cost, **changes})


def beside_config(label: str, path: Path) -> Origin:
    """The origin of a single file: its folder is a model's where a config.json lies beside it."""
    folder = path.parent if (path.parent / "config.json").is_file() else None
    return Origin(label, folder, locations=(path,) if folder is None else (folder, path), stores=stores_of(path.name))


def stores_of(weights: str) -> dict[str, str]:
    """How a library looks for the weights that it keeps in a file of that name, where that is not `model`."""
    return {"": DIFFUSION} if weights.startswith(DIFFUSION) else {}


@dataclass(frozen=True)
class LowRank:
    """A change of a tensor that is exactly left @ right: [rows, rank] and [rank, columns], read when asked for."""

    rank: int
    read: Callable[[], tuple[Tensor, Tensor]]


class Source(ABC):
    """A read-only map name -> tensor.  Listing keys reads headers only.

    keys     name -> Key, in a fixed order; a tied tensor is listed once
    aliases  tied name -> the listed name that holds its data
    origin   where it comes from

    str() gives its label.  A new kind of input sets these and writes `block`, and `fingerprint` if it lies in files.
    It must survive pickling (file-backed sources reopen themselves).
    """

    keys: Mapping[str, Key]
    aliases: Mapping[str, str] = {}
    origin: Origin

    def __str__(self) -> str:
        return self.origin.label

    @abstractmethod
    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        """Rows low..high of a tensor, on the CPU: `Bits` as stored, or a tensor where it is calculated on reading.

        into  contiguous memory of that shape and item size which stored bits may be put into, instead of new memory
        """

    def computes(self, name: str) -> bool:
        """Whether `block` gives a tensor and not `Bits`, known without reading."""
        return False

    def quick(self, name: str) -> bool:
        """Whether a few rows are read in little more time than their bytes take: not calculated, not far away."""
        return not self.computes(name)

    def read_cost(self, name: str) -> float:
        """Extra bytes held while reading, per byte of float32 result."""
        return 0.0

    def factors(self, name: str, base: Source) -> LowRank | None:
        """What makes this tensor of `base`'s, where that is exactly the sum with a product."""
        return None

    def prepare(self) -> None:  # noqa: B027  (nothing to do for most sources)
        """Fetch what is not on this machine yet.  Planning works without; the first `block` does it too."""

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data without reading it all: files, sizes, times, hashes of headers and samples.

        Empty in memory.  `inputs.opened` adds hashes of all bytes where they are asked for.

        Raises SourceError if a file is no longer the one that was opened.
        """
        return {}

    def key(self, name: str) -> Key:
        """The key of a tensor by its name or an alias; SourceError with the nearest names where there is none."""
        try:
            return self.keys[self.aliases.get(name, name)]
        except KeyError:
            raise SourceError(f"{self}: no tensor {name!r}{did_you_mean(name, self.keys)}") from None

    def read(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows low..high of a tensor, on the CPU: in its stored dtype, or as it is calculated."""
        found = self.block(name, low, high)
        return found.tensor() if isinstance(found, Bits) else found

    def bits(self, name: str, low: int = 0, high: int | None = None) -> np.ndarray:
        """Rows low..high as they are stored, see `Bits.array`; for tensors that are not calculated.  No torch."""
        found = self.block(name, low, high) if not self.computes(name) else None
        if not isinstance(found, Bits):
            raise SourceError(f"{self}: {name!r} is calculated on reading and has no stored bits")
        return found.array


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


def numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits as flat float64 numbers; without torch where the dtype is one of numpy's or bfloat16."""
    bits = bits.reshape(-1)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.startswith("float8"):
        made: np.ndarray = bits_to_tensor(bits, dtype).double().numpy()
        return made
    return bits.view(dtype).astype(np.float64)


def quick_rows(source: Source, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a source as flat float64 numbers, for looks at samples, see `Source.quick`."""
    if source.computes(name):
        value: np.ndarray = source.read(name, start, stop).double().numpy()
        return value.reshape(-1)
    return numbers(source.bits(name, start, stop), source.key(name).dtype)


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
        self.origin = Origin(label)
        self._tensors: dict[str, Tensor] = {}
        keys: dict[str, Key] = {}
        aliases: dict[str, str] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise SourceError(f"{label}: {name} has dtype {dtype}, which cannot be merged or stored")
            if tensor.numel():
                memory = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)
                if memory in seen:
                    aliases[name] = seen[memory]
                    continue
                seen[memory] = name
            self._tensors[name] = tensor.detach()
            keys[name] = Key(name, tuple(tensor.shape), dtype)
        self.keys, self.aliases = keys, aliases

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        tensor = self._tensors[key.name]
        if tensor.ndim and (low or high is not None):
            tensor = tensor[low:high]
        return Bits(tensor_to_bits(tensor.cpu()), key.dtype)
