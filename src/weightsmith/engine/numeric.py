"""Numbers that are none: found in inputs and results, and lost in the cast to the output's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from weightsmith.core.errors import NumericError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.source import tensor_to_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cast", "encode", "refuse_bad", "refuse_bad_result", "to_float"]


_LARGEST = {"float8_e4m3fn": 464.0}
"""The largest number that still rounds to a finite one, for dtypes without Inf."""


class _Setting(Protocol):
    @property
    def nonfinite(self) -> str:
        """'refuse' or 'allow'."""
        ...


def refuse_bad(value: Tensor, key: Key, who: str, start: int, context: _Setting) -> None:
    """Raise if a value is NaN or Inf.  A sum over it tells in one quick pass that all are finite."""
    if context.nonfinite == "allow" or not value.numel() or bool(torch.isfinite(value.sum())):
        return
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        place, what = _first(value, bad, start)
        raise NumericError(
            f"{key.name} in {who} holds {what} at {place} ({int(bad.sum())} in this block); "
            f'repair the input, or set "nonfinite: allow" in the recipe'
        )


def refuse_bad_result(key: Key, start: int, out: Tensor, context: _Setting, who: str, own: bool) -> None:
    """Raise if merged rows hold NaN or Inf.  `who` made them, a plug-in if `own`."""
    if context.nonfinite == "allow" or not out.numel() or bool(torch.isfinite(out.sum())):
        return
    bad = ~torch.isfinite(out)
    if bool(bad.any()):
        place, what = _first(out, bad, start)
        raise NumericError(
            f"{key.name}: {who} gives {what} at {place} although all inputs are finite; "
            f"{'look for what is divided by zero there' if own else 'lower the weights'}"
        )


def _first(value: Tensor, bad: Tensor, start: int) -> tuple[list[int], str]:
    """Index within the tensor of the first bad entry, and what it is."""
    index = [int(i) for i in torch.nonzero(bad)[0]] if bad.ndim else []
    what = str(value[tuple(index)].item()) if index else str(value.item())
    if index:
        index[0] += start
    return index, {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}.get(what, what)


def encode(value: Tensor, key: Key, start: int) -> np.ndarray:
    """`cast`, as bits."""
    return tensor_to_bits(cast(value, key, start))


def cast(value: Tensor, key: Key, start: int) -> Tensor:
    """Cast to the output dtype; a finite number that becomes Inf (or NaN, in fp8) is an error with its count."""
    target = getattr(torch, key.dtype)
    made = value.to(target)
    if key.dtype in _LARGEST:  # torch makes the largest number of all that is larger, Inf included
        outside = value.abs() > _LARGEST[key.dtype]
        made = torch.where(outside, float("nan"), to_float(made)).to(target) if bool(outside.any()) else made
    if target.is_floating_point and value.is_floating_point() and value.dtype != target and not _finite(made):
        lost = int((torch.isfinite(value) & ~torch.isfinite(to_float(made))).sum())
        if lost:
            worst = float(value.abs().max())
            raise NumericError(
                f"{key.name}: {lost} values from row {start} on do not fit into {key.dtype} (largest {worst:.4g}); "
                f"choose output dtype bfloat16 or float32"
            )
    return made


def _finite(value: Tensor) -> bool:
    """Whether a sum over it tells that all are finite, in a tenth of the time of a look at each."""
    summed = value if value.dtype in (torch.float16, torch.bfloat16) else to_float(value)
    return bool(torch.isfinite(summed.sum(dtype=torch.float32)))


def to_float(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
