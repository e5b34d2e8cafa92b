"""What a projection leaves out, kept for the next step; in 8 or 4 bits to save room."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.train.optim.projector import in_cache

__all__ = ["Feedback", "added", "bytes_of", "load", "save"]

Feedback = Literal[False, True, 4, 8]


def save(state: dict[str, Any], error: Tensor, bits: Feedback) -> None:
    """Store an error [n, N]: whole, or as `bits` wide steps between the least and the largest value of each row.

    The step of a row of equal values is 0.  Values are off by at most half a step (MicroAdam, arXiv 2405.15593).
    """
    if bits is True:
        state["error"] = error
        return
    parts = zip(*(_coded(block, bits) for block in in_cache(error)), strict=True)
    state |= dict(zip(("error", "error_low", "error_step"), map(torch.cat, parts), strict=True))


def added(state: dict[str, Any], rows: Tensor, bits: Feedback) -> Tensor:
    """The stored error plus rows [n, N], for `save` once it has lost what the step takes: the caller may change it."""
    if "error" not in state:
        return rows.clone()
    if bits is True:
        error: Tensor = state["error"]
        return error.add_(rows)
    size = rows.shape[1]
    sums = torch.empty_like(rows)
    stored = [in_cache(state[name], size) for name in ("error", "error_low", "error_step")]
    for into, block, codes, low, step in zip(in_cache(sums), in_cache(rows), *stored, strict=True):
        torch.add(block, _value(codes, low, step, size, bits), out=into)
    return sums


def load(state: dict[str, Any], size: int, bits: Feedback) -> Tensor:
    """The error [n, size] that is stored."""
    error: Tensor = state["error"]
    return error if bits is True else _value(error, state["error_low"], state["error_step"], size, bits)


def _coded(error: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n, N] (two in a byte where they have 4 bits), least values and steps [n, 1]."""
    low, high = error.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((error - low) / torch.where(step > 0, step, 1)).round_().to(torch.uint8)
    if bits == 4:
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[:, ::2] << 4 | codes[:, 1::2]
    return codes, low, step


def _value(codes: Tensor, low: Tensor, step: Tensor, size: int, bits: int) -> Tensor:
    """The inverse of `_coded`, to half a step."""
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)[:, :size]
    return codes * step + low


def bytes_of(rows: int, size: int, width: int, bits: Feedback) -> int:
    """Bytes of a stored error [rows, size] whose numbers take `width` bytes."""
    if bits is False:
        return 0
    if bits is True:
        return rows * size * width
    return rows * (size if bits == 8 else -(-size // 2)) + 2 * rows * width
