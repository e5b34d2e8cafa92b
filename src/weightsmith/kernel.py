"""What the fused kernels can do, as values: a method says which one gives its bytes (`Method.fused`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BF16", "E4M3", "E5M2", "F16", "F32", "SIGNATURES", "STRIP", "TrimmedVote", "WeightedSum"]

BF16, F32, F16, E4M3, E5M2 = range(5)
"""How the kernels are told what an array of stored bits holds."""

STRIP = 1 << 11
"""Entries that a kernel works on at once: a few float32 copies of them stay in a core's own cache."""

SIGNATURES = {
    "weighted_sum": "iiiiiiffiiiii",
    "magnitudes": "iiiiiii",
    "count_between": "iiiiiiiiii",
    "trimmed_vote": "iiiiiiiiififiiiii",
}
"""Kernel -> its arguments: i is a 64-bit integer (or an address), f a float32.  All return a 64-bit integer."""


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

    kept    share of each task vector that is kept; where all are 1 nothing is trimmed
    steps   what each measuring round finds out: 'high', 'low', 'ties' (as in `ops.select`), 'signs'
    zero    whether an even vote counts as plus ('plus'), as the majority of all signs, or its opposite
    mean    divide by the sum of the agreeing weights
    """

    weights: tuple[float, ...]
    scale: float
    kept: tuple[float, ...]
    steps: tuple[str, ...]
    zero: str
    mean: bool

    @property
    def trim(self) -> bool:
        """Whether anything is trimmed at all."""
        return any(share != 1 for share in self.kept)
