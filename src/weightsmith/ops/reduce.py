"""Sums whose bytes do not depend on blocks, threads or device.

`Tensor.sum` adds in an order that depends on the shape of the block and on the number of threads.  Here
the order is a fixed tree of elementwise additions in float64, which are the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_rows", "block_sums", "pairwise_sum", "row_sums"]


def pairwise_sum(values: Tensor) -> Tensor:
    """Sum over the last axis in float64 by halving it again and again: [*, m] -> [*]."""
    length = values.shape[-1]
    if length == 0:
        return values.new_zeros(values.shape[:-1], dtype=torch.float64)
    values = values.double()
    while length > 1:
        half = length // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([folded, values[..., 2 * half :]], -1) if length % 2 else folded
        length = values.shape[-1]
    return values[..., 0]


def as_rows(block: Tensor) -> Tensor:
    """A block as rows of the tensor's first axis: [rows, *rest] -> [rows, m]; 0-dim -> [1, 1]."""
    return block.reshape(block.shape[0], -1) if block.ndim and block.numel() else block.reshape(1, -1)


def row_sums(block: Tensor) -> Tensor:
    """One float64 sum per row: [rows, *rest] -> [rows].  The same for every way to cut the tensor into rows."""
    return pairwise_sum(as_rows(block))


def block_sums(block: Tensor) -> Tensor:
    """The float64 sum of a block, as a 0-dim tensor."""
    return pairwise_sum(row_sums(block))
