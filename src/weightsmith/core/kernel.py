"""What the kernels can do, as values: a stage says how its bytes are made (`Stage.fused`), a pass how it looks.

Plain descriptions.  `kernels/` has a backend for each; passes in them (`Any` here) are the keys of their results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

__all__ = [
    "Agreement",
    "Balance",
    "Drop",
    "Elected",
    "Filter",
    "Fused",
    "Lengths",
    "Look",
    "Magnitudes",
    "Masses",
    "Mix",
    "Products",
    "Program",
    "Ranked",
    "Times",
    "Vote",
    "WeightedSum",
    "Window",
    "Within",
    "sign_of_zero",
]


# --- merges --------------------------------------------------------------------------------------
#
# Specs of one place (before, combine, after) have the same fields; those that mean nothing for one are constants.


@dataclass(frozen=True)
class WeightedSum:
    """`x = sum_i weights[i] * input_i`, added in order and then divided by `divisor`, in float32.

    With `deltas`, input_i is expert_i - base and the result is base + scale * x; else the result is x.

    factor  pass that finds the scale, or None
    """

    place: ClassVar[str] = "combine"
    votes: ClassVar[bool] = False
    shares: ClassVar[Any] = None
    ends: ClassVar[bool] = False
    cut: ClassVar[Any] = None
    signs: ClassVar[Any] = None
    zero: ClassVar[str] = "plus"
    mean: ClassVar[bool] = False

    weights: tuple[float, ...]
    divisor: float = 1.0
    scale: float = 1.0
    deltas: bool = False
    factor: Any = None

    @property
    def plain(self) -> bool:
        """Whether it works on the inputs themselves, so that no filter may stand beside it."""
        return not self.deltas

    @property
    def wants_base(self) -> bool:
        """Whether it reads the base, if there is one."""
        return self.deltas

    def total(self, found: Mapping[Any, Any]) -> WeightedSum:
        """The sum in it, once its passes have results."""
        return self


@dataclass(frozen=True)
class Vote:
    """TIES: trim each task vector, weigh, elect a sign by mass, combine what agrees; base + scale * x.

    cut     pass that finds the cuts to trim at, or None
    signs   pass that adds up all elected signs, or None
    zero    sign of an even vote: 'plus', that of `signs` ('majority'), or its opposite
    mean    divide by the sum of the agreeing weights
    factor  pass that finds the scale, or None
    """

    place: ClassVar[str] = "combine"
    votes: ClassVar[bool] = True
    shares: ClassVar[Any] = None
    ends: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    wants_base: ClassVar[bool] = True

    weights: tuple[float, ...]
    scale: float
    cut: Any
    signs: Any
    zero: str
    mean: bool
    factor: Any = None

    def total(self, found: Mapping[Any, Any]) -> WeightedSum:
        """Weights and scale as a sum's."""
        return WeightedSum(self.weights, 1.0, self.scale)


def sign_of_zero(rule: str, signs: Any) -> float:
    """The sign of an even vote: plus, or that of the sum of all elected signs (a sum of 0: plus), or its opposite."""
    if rule == "plus" or int(signs) == 0:
        return 1.0
    majority = 1.0 if int(signs) > 0 else -1.0
    return majority if rule == "majority" else -majority


@dataclass(frozen=True)
class Mix:
    """`sum_i shares[i] * input_i`, added in order in float32.

    shares  pass that finds them from the inputs' inner products
    ends    the base, if there is one, is the first of the inputs
    deltas  with a base, input_i is expert_i - base and the base is added to the sum
    """

    place: ClassVar[str] = "combine"
    votes: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    cut: ClassVar[Any] = None
    signs: ClassVar[Any] = None
    zero: ClassVar[str] = "plus"
    mean: ClassVar[bool] = False
    factor: ClassVar[Any] = None

    shares: Any = None
    ends: bool = False
    deltas: bool = False

    @property
    def wants_base(self) -> bool:
        """Whether it reads the base, if there is one."""
        return self.deltas or self.ends

    def total(self, found: Mapping[Any, Any]) -> WeightedSum:
        """A mixture is a weighted sum as soon as its shares are measured."""
        return WeightedSum(tuple(float(share) for share in found[self.shares]), deltas=self.deltas)


@dataclass(frozen=True)
class Drop:
    """A filter: keep an entry of task vector i with probability shares[i] + spans[i] r, by the noise of `ops.noise`.

    salt     of the noise
    factors  pass that finds what the survivors are multiplied by, or None
    divide   whether they are divided by their share
    spans    r is the rank by |delta| along the second axis, from 0 to 1, equals by index; (): the same for all entries
    ranks    pass that finds r of vectors, which may come in pieces
    """

    place: ClassVar[str] = "before"
    marks: ClassVar[bool] = True
    vote: ClassVar[Any] = None
    cut: ClassVar[Any] = None
    values: ClassVar[tuple[float, ...]] = ()

    shares: tuple[float, ...]
    salt: str
    factors: Any = None
    divide: bool = False
    spans: tuple[float, ...] = ()
    ranks: Any = None


@dataclass(frozen=True)
class Window:
    """A filter: keep the entries that come before the last of the cuts, by falling |delta| over the tensor.

    cut      pass that finds the cuts; of two, what comes before the first is dropped
    factors  as of `Drop`
    """

    place: ClassVar[str] = "before"
    marks: ClassVar[bool] = False
    vote: ClassVar[Any] = None
    shares: ClassVar[tuple[float, ...]] = ()
    spans: ClassVar[tuple[float, ...]] = ()
    salt: ClassVar[str] = ""
    divide: ClassVar[bool] = False
    ranks: ClassVar[Any] = None
    values: ClassVar[tuple[float, ...]] = ()

    cut: Any
    factors: Any = None


@dataclass(frozen=True)
class Times:
    """A filter: multiply task vector i by values[i]."""

    place: ClassVar[str] = "before"
    marks: ClassVar[bool] = False
    vote: ClassVar[Any] = None
    shares: ClassVar[tuple[float, ...]] = ()
    spans: ClassVar[tuple[float, ...]] = ()
    salt: ClassVar[str] = ""
    divide: ClassVar[bool] = False
    cut: ClassVar[Any] = None
    factors: ClassVar[Any] = None
    ranks: ClassVar[Any] = None

    values: tuple[float, ...]


@dataclass(frozen=True)
class Elected:
    """A filter: trim each task vector as a vote does, and keep what has the sign that the vote elects.

    vote  of weights 1; its scale means nothing
    """

    place: ClassVar[str] = "before"
    marks: ClassVar[bool] = True
    shares: ClassVar[tuple[float, ...]] = ()
    spans: ClassVar[tuple[float, ...]] = ()
    salt: ClassVar[str] = ""
    divide: ClassVar[bool] = False
    factors: ClassVar[Any] = None
    ranks: ClassVar[Any] = None
    values: ClassVar[tuple[float, ...]] = ()

    vote: Vote

    @property
    def cut(self) -> Any:
        """Pass that finds the cuts to trim at, or None."""
        return self.vote.cut


@dataclass(frozen=True)
class Agreement:
    """A filter of the merged task vector tau: keep what k task masks |delta_i| > strict[i] |tau - delta_i| select.

    factor  pass that finds the scale, or None
    """

    place: ClassVar[str] = "after"
    cut: ClassVar[Any] = None

    k: int
    strict: tuple[float, ...]
    scale: float
    factor: Any = None

    def total(self, found: Mapping[Any, Any]) -> float:
        """The scale, given what its pass has found."""
        return self.scale if self.factor is None else float(found[self.factor])

    @property
    def unscaled(self) -> Agreement:
        """The same, while the scale is not known yet."""
        return self if self.factor is None else replace(self, factor=None, scale=1.0)


Filter = Drop | Window | Times | Elected
"""What filters of task vectors do, one after the other.

marks  whether what it keeps is found before a block is gone through, and may be remembered
"""

Fused = WeightedSum | Vote | Mix | Filter | Agreement
"""What a stage may say of itself."""


@dataclass(frozen=True)
class Program:
    """What the kernels do in one go: filters of task vectors, one way to combine them, one filter of the result.

    The i-th filter is the i-th stage of its pipeline, so that its passes are that stage's.
    """

    combine: WeightedSum | Vote | Mix
    before: tuple[Filter, ...] = ()
    after: Agreement | None = None

    @classmethod
    def of(cls, specs: Sequence[Fused | None]) -> Program | None:
        """The program of a pipeline's stages in order, or None if the kernels have none for it."""
        order = ("before", "combine", "after")
        before, combining, after = ([s for s in specs if s is not None and s.place == place] for place in order)
        if len(combining) != 1 or len(after) > 1 or list(specs) != [*before, *combining, *after]:
            return None
        combine: Any = combining[0]
        filters: Any = before
        last: Any = after[0] if after else None
        return None if combine.plain and (before or after) else cls(combine, tuple(filters), last)

    @property
    def ranks(self) -> bool:
        """Whether a filter goes by size."""
        return any(one.cut is not None or one.spans for one in self.before)

    @property
    def masks(self) -> bool:
        """Whether it is more than a weighted sum of the inputs."""
        return bool(self.before) or self.after is not None or self.combine.votes

    @property
    def unscaled(self) -> Program:
        """The same, while no scale of the merged task vector is known yet."""
        unknown: dict[str, Any] = {"factor": None}
        combine = self.combine if self.combine.factor is None else replace(self.combine, **unknown)
        return replace(self, combine=combine, after=self.after and self.after.unscaled)

    def at(self, index: int) -> Program:
        """What merges before stage `index` scales: all up to it, itself at scale 1."""
        if index <= len(self.before) or self.after is None:
            return replace(self.unscaled, after=None)
        return replace(self, after=self.after.unscaled)

    def electing(self, index: int) -> Program:
        """What elects the signs that stage `index` asks for, a filter or the way to combine."""
        if index < len(self.before):
            return Program(self.before[index].vote, self.before[:index])
        return self.unscaled

    @property
    def wants_base(self) -> bool:
        """Whether it reads the base, if there is one."""
        return self.combine.wants_base


# --- looks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """Cuts by magnitude: ranks(total) gives for each expert how many of the largest come before each of its cuts."""

    cut: Any


@dataclass(frozen=True)
class Within:
    """Counts of the lower bits of magnitudes, for each expert within one value of the upper bits."""

    cells: tuple[int, ...]


@dataclass(frozen=True)
class Magnitudes:
    """|delta| of every entry of a vector."""


@dataclass(frozen=True)
class Masses:
    """Per row sum |delta|, before and after the stage's filter."""


@dataclass(frozen=True)
class Products:
    """Inner products, row by row, of all pairs of what is mixed."""

    mix: Mix


@dataclass(frozen=True)
class Lengths:
    """Row by row, the squares of the merged task vector at scale 1, and of all task vectors before any filter."""


@dataclass(frozen=True)
class Balance:
    """The sum of all signs that the program elects."""


Look = Ranked | Within | Magnitudes | Masses | Products | Lengths | Balance
"""What a pass may say of itself."""
