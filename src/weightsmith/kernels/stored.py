"""Blocks of stored bits, and how the kernels are told where they lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from weightsmith.kernels import native
from weightsmith.kernels.record import BF16, E4M3, E5M2, F16, F32, STRIP

__all__ = [
    "READ", "WRITTEN", "Marks", "Stored", "base_address", "dots", "empty", "input_addresses", "kernel",
    "room", "row_products", "row_sizes", "scratch", "wide",
]  # fmt: skip

READ: Mapping[str, int] = {
    "bfloat16": BF16, "float32": F32, "float16": F16, "float8_e4m3fn": E4M3, "float8_e5m2": E5M2,
}  # fmt: skip
"""Dtypes that the kernels read; inputs of any other take the torch path."""

WRITTEN: Mapping[str, str] = {"bfloat16": "u2", "float32": "u4", "float16": "u2"}
"""Dtypes that the kernels write, and how numpy holds their bits."""


class Marks(Protocol):
    """What filters keep of some rows, a bit for each entry, packed: by whatever makes them equal."""

    def get(self, which: Hashable, /) -> np.ndarray | None: ...
    def __setitem__(self, which: Hashable, packed: np.ndarray, /) -> None: ...


@dataclass(frozen=True)
class Stored:
    """Rows of every expert and of the base, equally shaped arrays of stored bits, and their dtypes.

    `base` is None where it is not plain stored data (or not there at all).

    kept  what filters have kept of these rows, for whoever goes over them again
    """

    experts: Sequence[np.ndarray]
    dtypes: Sequence[str]
    base: np.ndarray | None = None
    base_dtype: str = "float32"
    kept: Marks = field(default_factory=dict[Hashable, np.ndarray], compare=False)

    def __getitem__(self, rows: slice) -> Stored:
        base = None if self.base is None else self.base[rows]
        return Stored([bits[rows] for bits in self.experts], self.dtypes, base, self.base_dtype)

    @property
    def size(self) -> int:
        return self.experts[0].size

    @property
    def shape(self) -> tuple[int, int]:
        """As rows of the first axis: (rows, entries per row)."""
        shape = self.experts[0].shape
        rows = shape[0] if shape else 1
        return rows, self.size // max(rows, 1)

    @property
    def ends(self) -> Stored:
        """The base and the experts as experts, without a base: what interpolation goes between."""
        if self.base is None:
            return self
        return Stored([self.base, *self.experts], [self.base_dtype, *self.dtypes])


def kernel(name: str) -> Callable[..., int]:
    """A kernel that `merge.available` has promised."""
    found = native.kernels()
    assert found is not None
    return found[name]


def empty(stored: Stored, dtype: str) -> np.ndarray:
    """Room for a result in the bits of `dtype`."""
    return np.empty(stored.experts[0].shape, WRITTEN[dtype])


def input_addresses(stored: Stored, weights: np.ndarray) -> tuple[int, int, int, int]:
    """Addresses of: the experts' addresses, their kinds, their weights; and how many."""
    # The kernel reads these arrays by address: they must outlive the call, and belong to this thread.
    kept = _local.__dict__
    kept["addresses"] = np.array([bits.ctypes.data for bits in stored.experts], np.int64)
    kept["kinds"] = np.array([READ[dtype] for dtype in stored.dtypes], np.int64)
    return kept["addresses"].ctypes.data, kept["kinds"].ctypes.data, weights.ctypes.data, len(weights)


def base_address(stored: Stored | None) -> tuple[int, int]:
    """Address and kind of the base."""
    if stored is None:
        return 0, F32
    assert stored.base is not None
    return stored.base.ctypes.data, READ[stored.base_dtype]


_local = threading.local()
"""Arrays of this thread that a running kernel reads."""


def scratch(strips: int) -> int:
    """The address of room for so many strips of float32, kept for the next block."""
    return room("scratch", strips * STRIP, np.float32)


def wide(rows: int, width: int) -> int:
    """The address of room for so many rows of float64, likewise."""
    return room("wide", rows * width, np.float64)


def room(name: str, size: int, dtype: type) -> int:
    """The address of room for so many numbers, kept under this name."""
    kept: dict[str, np.ndarray] = _local.__dict__
    # Grows and never shrinks: the blocks of a merge are of one size.
    if name not in kept or kept[name].size < size:
        kept[name] = np.empty(size, dtype)
    return kept[name].ctypes.data


def row_products(
    addresses: Sequence[int], kinds: Sequence[int], shape: tuple[int, int], base: tuple[int, int] | None = None
) -> tuple[np.ndarray, int]:
    """Inner products row by row of all pairs i <= j of stored inputs [rows, width], with `base` of their differences
    from it: (float64 [n (n + 1) / 2, rows], how many entries are NaN or Inf)."""
    count, (rows, width) = len(addresses), shape
    # float64, pairs by rows
    found = np.empty((count * (count + 1) // 2, rows))
    inputs, stored = np.array(addresses, np.int64), np.array(kinds, np.int64)
    bad = kernel("row_products")(
        inputs.ctypes.data, stored.ctypes.data, count, *(base or (0, F32)), base is not None, found.ctypes.data,
        rows, width, room("values", (count + 1) * width, np.float32), wide(1, width),
    )  # fmt: skip
    return found, bad


def dots(stored: Stored, other: np.ndarray, deltas: bool) -> np.ndarray:
    """Inner products of the experts, or of their task vectors, with a float32 array of their size: float64 [n].

    Not finite where an input is not, or where products are too large.
    """
    found = np.empty(len(stored.experts))
    kernel("dots")(
        *input_addresses(stored, found)[:2], len(found), *base_address(stored if deltas else None), deltas,
        other.ctypes.data, found.ctypes.data, stored.size, scratch(2 + len(found)),
    )  # fmt: skip
    return found


def row_sizes(address: int, kind: int, shape: tuple[int, int]) -> np.ndarray:
    """Per row sum |x| of a stored input [rows, width]: float64 [rows]."""
    rows, width = shape
    found = np.empty(rows)
    kernel("row_sizes")(
        address, kind, found.ctypes.data, rows, width, room("values", width, np.float32), wide(1, width)
    )
    return found
