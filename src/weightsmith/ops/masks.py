"""One bit per weight and expert: which weights of a merged task vector belong to a task, packed eight to a byte.

Masks: "Localizing Task Information for Improved Model Merging and Compression", arXiv:2405.07813, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["agreed", "pack_bits", "run_length", "task_masks", "unpack_bits"]

RUN = 1 << 16
"""About how many weights share one copy of a factor: a part has to be found from any place of the tensor."""

# The first element of eight is the highest bit, as in numpy.packbits.
_GATHER = 0x8040201008040201 - (1 << 64)  # sum over i of 2^(63 - 9 i), as a signed number
_LOWEST = 0x0101010101010101  # the lowest bit of each of eight bytes


def run_length(row_numel: int) -> int:
    """Elements of a tensor, whole rows, that share one stored copy of a factor."""
    row = max(row_numel, 1)
    return row * max(1, RUN // row)


def task_masks(deltas: Tensor, merged: Tensor, strictness: Sequence[float]) -> Tensor:
    """m_t = |delta_t| > lambda_t |tau - delta_t|, strictly: bool [n, *block].

    deltas      the experts' task vectors delta_t: [n, *block]
    merged      the merged task vector tau: [*block]
    strictness  lambda_t >= 0 of every expert; a larger one selects a part of what a smaller one selects

    A weight that the expert left as it was is never selected; one that nobody else changed always is.
    """
    chosen = [d.abs() > (merged - d).abs() * lam for d, lam in zip(deltas, strictness, strict=True)]
    return torch.stack(chosen)


def agreed(masks: Tensor, k: int) -> Tensor:
    """Which entries at least k of the masks select: bool [n, *block] -> bool [*block]."""
    # torch adds bools as int64: exact in any order.
    return masks.sum(0) >= k


def pack_bits(mask: Tensor) -> Tensor:
    """A mask's bits in row-major order, the first in the highest bit, padded with zeros: bool [*] -> uint8 [bytes]."""
    flat = mask.reshape(-1)
    bits = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=mask.device)
    bits[: flat.numel()] = flat
    # Eight bytes of 0 or 1 as one little-endian integer: the product moves bit 8 i to 63 - i and puts no other
    # bit above 55, so its highest byte is the packed one (15 times as fast as eight shifts).
    return ((bits.view(torch.int64) * _GATHER) >> 56 & 0xFF).to(torch.uint8)


def unpack_bits(packed: Tensor, skip: int, count: int) -> Tensor:
    """`count` bits behind the first `skip`: uint8 [bytes] -> bool [count]."""
    # The way back of `pack_bits`: the product brings bit 7 - i to the place of the lowest of byte i.
    spread = (packed.to(torch.int64) * _GATHER) >> 7 & _LOWEST
    return spread.view(torch.uint8)[skip : skip + count].view(torch.bool)
