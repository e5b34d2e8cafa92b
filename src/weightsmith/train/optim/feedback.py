"""What a projection leaves out, kept for the next step; in 8 or 4 bits to save room."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Feedback", "bytes_of", "load", "save"]

Feedback = Literal[False, True, 4, 8]


def save(state: dict[str, Any], error: Tensor, bits: Feedback) -> None:
    """Store an error [n, N]: whole, or as `bits` wide steps between the least and the largest value of each row.

    The step of a row of equal values is 0.  Values are off by at most half a step (MicroAdam, arXiv 2405.15593).
    """
    if bits is True:
        state["error"] = error
        return
    low, high = error.aminmax(dim=1, keepdim=True)  # [n, 1]
    step = (high - low) / (2**bits - 1)
    codes = ((error - low) / torch.where(step > 0, step, 1)).round_().to(torch.uint8)
    if bits == 4:
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[:, ::2] << 4 | codes[:, 1::2]
    state |= {"error": codes, "error_low": low, "error_step": step}


def load(state: dict[str, Any], size: int, bits: Feedback) -> Tensor | None:
    """The error [n, size] that was stored, None before the first."""
    codes: Tensor | None = state.get("error")
    if codes is None or bits is True:
        return codes
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)[:, :size]
    found: Tensor = codes * state["error_step"] + state["error_low"]
    return found


def bytes_of(rows: int, size: int, width: int, bits: Feedback) -> int:
    """Bytes of a stored error [rows, size] whose numbers take `width` bytes."""
    if bits is False:
        return 0
    if bits is True:
        return rows * size * width
    return rows * (size if bits == 8 else -(-size // 2)) + 2 * rows * width
