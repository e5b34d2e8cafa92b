"""Sums whose bytes do not depend on blocks, threads or device.

`Tensor.sum` adds in an order that depends on the shape of the block and on the number of threads.  Here
the order is a fixed tree of elementwise additions in float64, which are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.kernels import native, stored
from weightsmith.kernels.record import F32

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "as_rows",
    "block_sizes",
    "block_squares",
    "block_sums",
    "pairwise_sum",
    "row_products",
    "row_sizes",
    "row_squares",
    "row_sums",
]

Values = TypeVar("Values")
"""Tensors or numpy arrays."""


def pairwise_sum(values: Values) -> Values:
    """Sum over the last axis in float64 by halving it again and again: [*, m] -> [*], tensors or numpy arrays."""
    plain = isinstance(values, np.ndarray)
    found: Any = values.astype(np.float64) if isinstance(values, np.ndarray) else values.double()  # type: ignore[attr-defined]
    join: Any = np.concatenate if plain else torch.cat
    length = found.shape[-1]
    if length == 0:
        return found.sum(-1)  # type: ignore[no-any-return]
    while length > 1:
        # The first half onto the second, not neighbours: both parts are contiguous.
        half = length // 2
        folded = found[..., :half] + found[..., half : 2 * half]
        # An odd entry is carried along, as the last one.
        found = join([folded, found[..., 2 * half :]], -1) if length % 2 else folded
        length = found.shape[-1]
    return found[..., 0]  # type: ignore[no-any-return]


def as_rows(block: Tensor) -> Tensor:
    """A block as rows of the tensor's first axis: [rows, *rest] -> [rows, m]; 0-dim -> [1, 1]."""
    return block.reshape(block.shape[0], -1) if block.ndim and block.numel() else block.reshape(1, -1)


def row_sums(block: Tensor) -> Tensor:
    """One float64 sum per row: [rows, *rest] -> [rows].  The same for every way to cut the tensor into rows."""
    return pairwise_sum(as_rows(block))


def row_products(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products row by row of all pairs i <= j of n equal blocks: float64 [n (n + 1) / 2, rows], on the device.

    The kernels give the bytes of `row_sums`, without a float64 copy of anything but a row.
    """
    rows = [as_rows(vector) for vector in vectors]
    # The kernels fold in the same tree, a row at a time.
    if all(map(_readable, rows)):
        found, _ = stored.row_products([r.data_ptr() for r in rows], [F32] * len(rows), _shape(rows[0]))
        return torch.from_numpy(found)
    # i <= j, row after row, as `gram.square` reads them.
    pairs = [(rows[i], rows[j]) for i in range(len(rows)) for j in range(i, len(rows))]
    # float32 numbers have 24 bits, so a product of two is exact in float64.
    return torch.stack([pairwise_sum(a.double() * b) for a, b in pairs])


def row_squares(block: Tensor) -> Tensor:
    """Per row sum x^2: [rows, *rest] -> float64 [rows]."""
    return row_products([block])[0]


def row_sizes(block: Tensor) -> Tensor:
    """Per row sum |x|: [rows, *rest] -> float64 [rows]."""
    rows = as_rows(block)
    if _readable(rows):
        return torch.from_numpy(stored.row_sizes(rows.data_ptr(), F32, _shape(rows)))
    return pairwise_sum(rows.abs())


def _shape(rows: Tensor) -> tuple[int, int]:
    height, width = rows.shape
    return height, width


def _readable(rows: Tensor) -> bool:
    """Whether the kernels may read it."""
    # The kernels read memory by address: no strides, no device, no graph of gradients.
    plain = rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.is_contiguous()
    return plain and not rows.requires_grad and native.kernels() is not None


def block_sums(block: Tensor) -> Tensor:
    """The float64 sum of a block, as a 0-dim tensor."""
    return pairwise_sum(row_sums(block))


def block_sizes(block: Tensor) -> Tensor:
    """sum |x| of a block, float64, 0-dim."""
    return pairwise_sum(row_sizes(block))


def block_squares(block: Tensor) -> Tensor:
    """sum x^2 of a block, float64, 0-dim."""
    return pairwise_sum(row_squares(block))
