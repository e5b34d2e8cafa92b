"""What the fused kernels can do, as values: a stage says which one gives its bytes (`Stage.fused`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "BF16",
    "E4M3",
    "E5M2",
    "F16",
    "F32",
    "HIGH",
    "LOW",
    "SIGNATURES",
    "STRIP",
    "Agreement",
    "Drop",
    "Fused",
    "Mix",
    "Program",
    "TrimmedVote",
    "WeightedSum",
    "Window",
]

BF16, F32, F16, E4M3, E5M2 = range(5)
"""How the kernels are told what an array of stored bits holds."""

STRIP = 1 << 11
"""Entries that a kernel works on at once: a few float32 copies of them stay in a core's own cache."""

HIGH, LOW = 1 << 15, 1 << 16
"""Magnitudes have 31 bits, counted in two rounds: by the upper 15, then by the lower 16 within one value of these."""

SIGNATURES = {
    "weighted_sum": "iiiiiiffiiiii",
    "magnitudes": "iiiiiii",
    "count_between": "iiiiiiiiii",
    "count_cells": "iiiiiiii",
    "masked_merge": "iiiiiiiiiiiiiififfiifiiiii",
    "row_masses": "iiiiiiiiiiiiiiiii",
    "row_products": "iiiiiiiiiii",
    "row_sizes": "iiiiiii",
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

    trim    whether anything is trimmed at all, at the first of the stage's `cuts`
    steps   what each measuring round finds out: 'high', 'low', 'ties' (as in `ops.select`), 'signs'
    zero    whether an even vote counts as plus ('plus'), as the majority of all signs, or its opposite
    mean    divide by the sum of the agreeing weights
    """

    weights: tuple[float, ...]
    scale: float
    trim: bool
    steps: tuple[str, ...]
    zero: str
    mean: bool


@dataclass(frozen=True)
class Mix:
    """`sum_i shares[i] * input_i`, added in order in float32, by shares that the inputs' inner products tell.

    ends    the base, if there is one, is the first of the inputs
    deltas  with a base, input_i is expert_i - base and the base is added to the sum
    """

    ends: bool = False
    deltas: bool = False


@dataclass(frozen=True)
class Drop:
    """A filter: keep an entry of task vector i with probability shares[i], by the noise of `ops.noise`.

    salt    of the noise
    rescale what the survivors are scaled by: '' nothing, 'expectation' 1 / share, 'l1' what measuring finds
    """

    shares: tuple[float, ...]
    salt: str
    rescale: str


@dataclass(frozen=True)
class Window:
    """A filter: keep what lies, by falling |delta| over the tensor, in front of the last of the stage's `cuts`.

    Of two cuts the first drops what lies in front of it.  rescale: '' or 'l1', as of `Drop`.
    """

    rescale: str
    trim: ClassVar[bool] = True


@dataclass(frozen=True)
class Agreement:
    """A filter of the merged task vector tau: keep what k task masks |delta_i| > strict[i] |tau - delta_i| select."""

    k: int
    strict: tuple[float, ...]
    scale: float


Fused = WeightedSum | TrimmedVote | Mix | Drop | Window | Agreement
"""What a stage may say of itself."""


@dataclass(frozen=True)
class Program:
    """What the kernels do in one pass: at most one filter of task vectors, one way to combine, one filter of that."""

    combine: WeightedSum | TrimmedVote | Mix
    before: Drop | Window | None = None
    after: Agreement | None = None

    @classmethod
    def of(cls, specs: Sequence[Fused | None]) -> Program | None:
        """The program of a pipeline's stages in order, or None if the kernels have none for it."""
        combining = [s for s in specs if isinstance(s, (WeightedSum, TrimmedVote, Mix))]
        before = [s for s in specs if isinstance(s, (Drop, Window))]
        after = [s for s in specs if isinstance(s, Agreement)]
        if len(combining) != 1 or len(before) > 1 or len(after) > 1 or list(specs) != [*before, *combining, *after]:
            return None
        combine = combining[0]
        plain = isinstance(combine, Mix) or (isinstance(combine, WeightedSum) and not combine.deltas)
        trims = isinstance(combine, TrimmedVote) and combine.trim
        if (plain and (before or after)) or (trims and before):
            return None
        return cls(combine, before[0] if before else None, after[0] if after else None)

    @property
    def masks(self) -> bool:
        """Whether it is more than a weighted sum of the inputs."""
        return self.before is not None or self.after is not None or isinstance(self.combine, TrimmedVote)

    @property
    def wants_base(self) -> bool:
        """Whether it reads the base, if there is one."""
        combine = self.combine
        return isinstance(combine, TrimmedVote) or combine.deltas or (isinstance(combine, Mix) and combine.ends)
