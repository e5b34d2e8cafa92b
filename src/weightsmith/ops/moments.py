"""Curvature statistics that are not negative: diagonal Fisher information, Adam's second moments.

Values go down to 1e-24 in language models: far above float32's least number (1e-38), far below its epsilon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.core.errors import NumericError
from weightsmith.core.lazy import torch
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["curvature", "low_rank", "rank_one"]

CALLED = {"fisher": "Fisher information", "second_moment": "second moment"}


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


def rank_one(values: Tensor) -> Tensor:
    """The product of row and column sums, r c^T / sum: what Adafactor keeps of a second moment.

    [rows, columns] >= 0 -> [rows, columns] >= 0; exact for outer products; zeros stay zeros.
    Source: Adafactor (Shazeer and Stern, ICML 2018), algorithm 2; arXiv:2509.11167 for merging.
    """
    wide = values.double()  # sums of many tiny numbers
    rows, columns = wide.sum(1), wide.sum(0)
    total = rows.sum()
    if not total > 0:
        return torch.zeros_like(values)
    return torch.outer(rows / total, columns).to(values.dtype)


def low_rank(values: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank by singular values, its negative entries set to 0: [rows, columns]."""
    left, scale, right = torch.linalg.svd(values.double(), full_matrices=False)
    found: Tensor = ((left[:, :rank] * scale[:rank]) @ right[:rank]).clamp_(min=0).to(values.dtype)
    return found
