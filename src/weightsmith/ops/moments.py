"""Curvature statistics that are not negative: diagonal Fisher information, Adam's second moments.

Values go down to 1e-24 in language models: far above float32's least number (1e-38), far below its epsilon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.core.errors import NumericError
from weightsmith.core.lazy import torch
from weightsmith.core.site import Site
from weightsmith.ops.spectral import top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CALLED", "curvature", "low_rank", "powered", "product", "rank_one"]

CALLED = {"fisher": "Fisher information", "second_moment": "second moment"}
"""The statistics with a value per weight, in words."""


def curvature(site: Site, statistic: str) -> tuple[Tensor, ...]:
    """One block per expert, shaped like the weights' block, every entry >= 0 and finite.

    Raises NumericError for another shape, and for negative, infinite or undefined entries.
    """
    found = site.stats[statistic]
    for i, values in enumerate(found):
        name = site.names[i] if site.names else f"model {i}"
        if values.shape != site.block_shape:
            raise NumericError(
                f"{site.key.name}: the {CALLED[statistic]} of {name} has shape {list(values.shape)}, "
                f"the weights {list(site.block_shape)}; make it anew from this model"
            )
        if values.numel() and not (values.amin() >= 0 and values.amax() < torch.inf):
            raise NumericError(
                f"{site.key.name}: the {CALLED[statistic]} of {name} is negative, infinite or not a number"
            )
    return found


def powered(values: Tensor, exponent: float) -> Tensor:
    """values^exponent, of the same shape and dtype, whichever instructions the processor has.

    In float32 even `Tensor.sqrt` is off in the last bit for one entry in a hundred, for others on another processor.
    """
    return values if exponent == 1 else (values.double() ** exponent).to(values.dtype)


def rank_one(values: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums as shares of the total, and column sums: what Adafactor keeps of a second moment.

    [rows, columns] >= 0 -> [rows, 1] and [1, columns], >= 0; exact for outer products, and every row and column keeps
    its sum.  Source: Adafactor (Shazeer and Stern, ICML 2018), algorithm 2; arXiv:2509.11167 for merging.
    """
    wide = values.double()  # sums of many tiny numbers
    rows, columns = wide.sum(1, keepdim=True), wide.sum(0, keepdim=True)
    total = rows.sum()
    return (rows / total if total > 0 else rows).to(values.dtype), columns.to(values.dtype)


def low_rank(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank by singular values: [rows, columns] -> [rows, rank] and [rank, columns]."""
    found = top_svd(values, rank)
    root = found.s.sqrt()
    return (found.u * root).to(values.dtype), (root[:, None] * found.v.T).to(values.dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right with negative entries set to 0: [rows, rank], [rank, columns] -> [rows, columns].

    Summed term by term, so that a row is the same however many are asked for.
    """
    total = left.new_zeros(left.shape[0], right.shape[1])
    for i in range(right.shape[0]):
        total.add_(left[:, i : i + 1] * right[i])
    return total.clamp_(min=0)
