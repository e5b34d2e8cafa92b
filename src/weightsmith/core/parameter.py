"""The parameters of a method: fields with a range and a one-line meaning.

Recipe, command line, docs and report all read the same ones.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from weightsmith.core.errors import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Each", "Parameter", "Traced", "Vector", "blend", "choice", "flag", "in_words", "integer", "is_tensor",
           "number", "opened", "plain_number", "traced"]  # fmt: skip

S = TypeVar("S")

_TYPES: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float)}
"""Kind of a parameter -> what its numbers are; a flag is none."""

Each = float | tuple[float, ...]
"""A parameter that is one number for all experts, or one number per expert."""


@dataclass(frozen=True)
class Parameter:
    """Range and meaning of one field; recipe, command line, docs and report read the same one."""

    name: str = ""  # as in YAML: the field's name without a trailing underscore
    field: str = ""
    kind: str = "number"  # number, integer, flag, choice
    default: Any = None
    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    options: tuple[str, ...] = ()  # the words allowed (for a number: besides numbers)
    each: bool = False  # may differ between experts
    smooth: bool = False  # the merge has a derivative with respect to it: it may be a tensor that requires grad
    several: bool = False  # takes a `Vector` too

    @property
    def range(self) -> str:
        """The allowed values in words, e.g. '(0, 1]' or 'global | tensor'."""
        words = " | ".join(self.options)
        if self.kind == "flag":
            return "true | false"
        if self.kind == "choice":
            return words
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high_open or self.high == math.inf else "]"
        span = f"{left}{_short(self.low)}, {_short(self.high)}{right}"
        return f"{span} | {words}" if words else span

    def check(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        if isinstance(value, tuple) and self.each:
            return next((text for v in value if (text := self.check(v))), None)
        if isinstance(value, tuple):
            return f"{self.name} takes one value, not one per expert"
        if isinstance(value, str) and value in self.options:
            return None
        if self.several and isinstance(value, Vector):
            return None
        if self.kind == "flag":
            good = isinstance(value, bool)
        elif self.kind == "choice":
            good = False
        else:
            good = isinstance(value, _TYPES[self.kind]) and not isinstance(value, bool)
            good = good and not math.isnan(value) and not math.isinf(value)
            good = good and (value > self.low if self.low_open else value >= self.low)
            good = good and (value < self.high if self.high_open else value <= self.high)
        if good and isinstance(value, Traced) and not self.smooth:
            return (
                f"{self.name} is a tensor that requires grad, but the merge has no derivative with respect to it; "
                f"give a number, and try several in a sweep"
            )
        if good:
            return None
        hint = ""
        if self.high == 1 and isinstance(value, (int, float)) and 1 < value <= 100:
            hint = f"; write {value}% as {value / 100:g}"
        elif isinstance(value, str) and self.kind in ("number", "integer") and _is_number(value):
            return f"{self.name} = {value!r} is a text; write {value.strip()} without quotes"
        elif isinstance(value, str) and self.kind == "number" and (meant := _meant(value)) is not None:
            hint = f"; write {meant:g}" if self.check(meant) is None else ""
        elif isinstance(value, str) and self.options:
            hint = did_you_mean(value, self.options)
        elif self.kind in _TYPES and (type(value) is bool or not isinstance(value, _TYPES[self.kind])):
            whole = "whole number" if self.kind == "integer" else "number"
            return f"{self.name} = {value!r} is no {whole}; it takes {self.range}"
        return f"{self.name} = {value!r} is outside {self.range}{hint}"


def _short(value: float) -> str:
    return "inf" if value == math.inf else "-inf" if value == -math.inf else f"{value:g}"


def plain_number(value: Any) -> Any:
    """The Python number that a scalar of NumPy, or an array or tensor without dimensions, holds; else the value.

    Of a tensor that requires grad it is `Traced`.
    """
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    return Traced(value) if getattr(value, "requires_grad", False) else value.item()


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor; torch need not be loaded to tell."""
    return hasattr(value, "requires_grad")


class Traced(float):
    """The number in a tensor that requires grad, and the tensor itself.

    Plans and merges see a float; the gradient pass takes the tensor.  Equal only to what holds the same tensor: two
    coefficients that start at 0.3 are two.  Pickled, it is a plain number.
    """

    __slots__ = ("tensor",)
    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> Traced:
        made = super().__new__(cls, tensor.item())
        made.tensor = tensor
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and other.tensor is self.tensor

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(id(self.tensor))

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)


class Vector:
    """Several numbers as one value of a parameter: a tensor [c], float32 or float64, never written to by a merge.

    Equal only to what holds the same tensor.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vector) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return hash(id(self.tensor))

    def __repr__(self) -> str:
        return f"<{self.tensor.numel()} numbers>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Vector, (self.tensor.detach(),)


def in_words(value: Any) -> Any:
    """A value of a parameter as JSON has it, where it is no number, word or collection of them."""
    return value.tensor.tolist() if isinstance(value, Vector) else str(value)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Traced) or is_tensor(value) or (isinstance(value, Vector) and value.tensor.requires_grad)


def traced(stage: Any) -> tuple[Any, ...]:
    """The traced numbers (and vectors) among a stage's parameters; of an `opened` stage the tensors."""
    given = (getattr(stage, spec.field) for spec in stage.parameters() if spec.smooth)
    values = (value for one in given for value in (one if isinstance(one, tuple) else (one,)))
    return tuple(value for value in values if _has_gradient(value))


def opened(stage: S, tensors: Callable[[Any], Any]) -> S:
    """The same stage, whose parameters are what `tensors` makes of them; unchecked, for the gradient pass."""
    made = copy.copy(stage)
    for spec in stage.parameters() if traced(stage) else ():  # type: ignore[attr-defined]
        given = getattr(stage, spec.field)
        object.__setattr__(made, spec.field, tuple(map(tensors, given)) if isinstance(given, tuple) else tensors(given))
    return made


def blend(left: Any, right: Any, share: float) -> float:
    """left (1 - share) + right share; of traced numbers a traced one."""
    if share == 0:
        return left if isinstance(left, Traced) else float(left)
    if isinstance(left, Traced) or isinstance(right, Traced):
        left, right = (v.tensor if isinstance(v, Traced) else v for v in (left, right))
        return Traced(left * (1 - share) + right * share)
    return float(left * (1 - share) + right * share)


def _meant(text: str) -> float | None:
    """The number that '0,5' or '50%' stands for."""
    words, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    words = words.replace(",", ".") if words.count(",") == 1 and "." not in words else words
    return float(words) / (100 if percent else 1) if _is_number(words) else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def number(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    options: tuple[str, ...] = (),
    each: bool = False,
    smooth: bool = False,
    several: bool = False,
    kind: str = "number",
) -> Any:
    """A float field: `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.

    smooth   the merge has a derivative with respect to it, and its methods take a tensor in its place
    several  a `Vector` may stand for it: a number for each part of a tensor
    """
    spec = Parameter(
        kind=kind,
        default=default,
        help=help,
        low=low if low is not None else above if above is not None else -math.inf,
        high=high if high is not None else below if below is not None else math.inf,
        low_open=above is not None,
        high_open=below is not None,
        options=options,
        each=each,
        smooth=smooth,
        several=several,
    )
    return dataclasses.field(default=default, metadata={"parameter": spec})


def integer(default: Any, help: str, *, low: int | None = None, high: int | None = None, each: bool = False) -> Any:
    """An integer field with inclusive bounds."""
    return number(default, help, low=low, high=high, each=each, kind="integer")


def flag(default: bool, help: str) -> Any:
    """A true/false field."""
    return dataclasses.field(
        default=default, metadata={"parameter": Parameter(kind="flag", default=default, help=help)}
    )


def choice(default: str, help: str, *options: str) -> Any:
    """A field that takes one of the given words."""
    spec = Parameter(kind="choice", default=default, help=help, options=options)
    return dataclasses.field(default=default, metadata={"parameter": spec})
