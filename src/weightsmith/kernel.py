"""What the fused kernels can do, as values: a method says which one gives its bytes (`Method.fused`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TrimmedVote", "WeightedSum"]


@dataclass(frozen=True)
class WeightedSum:
    """`x = sum_i weights[i] * input_i`, added in order and then divided by `divisor`, in float32.

    With `deltas`, input_i is expert_i - base and the result is base + scale * x; else the result is x.
    """

    weights: tuple[float, ...]
    divisor: float = 1.0
    scale: float = 1.0
    deltas: bool = False


@dataclass(frozen=True)
class TrimmedVote:
    """TIES: trim each task vector at its cut, weigh, elect a sign by mass, combine what agrees; base + scale * x.

    steps   what each measuring round finds out: 'high', 'low', 'ties' (as in `ops.select`), 'signs'
    trim    whether anything is trimmed at all
    zero    whether an even vote counts as plus ('plus'), as the majority of all signs, or its opposite
    mean    divide by the sum of the agreeing weights
    """

    weights: tuple[float, ...]
    scale: float
    steps: tuple[str, ...]
    trim: bool
    zero: str
    mean: bool
