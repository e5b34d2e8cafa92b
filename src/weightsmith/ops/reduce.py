"""Sums whose bytes do not depend on blocks, threads or device.

`Tensor.sum` adds in an order that depends on the shape of the block and on the number of threads.  Here
the order is a fixed tree of elementwise additions in float64, which are the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from weightsmith.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_rows", "block_sums", "pairwise_sum", "row_sums"]

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
        half = length // 2
        folded = found[..., :half] + found[..., half : 2 * half]
        found = join([folded, found[..., 2 * half :]], -1) if length % 2 else folded
        length = found.shape[-1]
    return found[..., 0]  # type: ignore[no-any-return]


def as_rows(block: Tensor) -> Tensor:
    """A block as rows of the tensor's first axis: [rows, *rest] -> [rows, m]; 0-dim -> [1, 1]."""
    return block.reshape(block.shape[0], -1) if block.ndim and block.numel() else block.reshape(1, -1)


def row_sums(block: Tensor) -> Tensor:
    """One float64 sum per row: [rows, *rest] -> [rows].  The same for every way to cut the tensor into rows."""
    return pairwise_sum(as_rows(block))


def block_sums(block: Tensor) -> Tensor:
    """The float64 sum of a block, as a 0-dim tensor."""
    return pairwise_sum(row_sums(block))
