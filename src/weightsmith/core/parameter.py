"""The parameters of a method: fields with a range and a one-line meaning.

Recipe, command line, docs and report all read the same ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import did_you_mean

__all__ = ["Each", "Parameter", "choice", "flag", "integer", "number", "plain_number"]

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
        if self.kind == "flag":
            good = isinstance(value, bool)
        elif self.kind == "choice":
            good = False
        else:
            good = isinstance(value, int if self.kind == "integer" else (int, float)) and not isinstance(value, bool)
            good = good and not math.isnan(value) and not math.isinf(value)
            good = good and (value > self.low if self.low_open else value >= self.low)
            good = good and (value < self.high if self.high_open else value <= self.high)
        if good:
            return None
        hint = ""
        if self.high == 1 and isinstance(value, (int, float)) and 1 < value <= 100:
            hint = f"; write {value}% as {value / 100:g}"
        elif isinstance(value, str) and self.kind in ("number", "integer") and _is_number(value):
            return f"{self.name} = {value!r} is a text; write {value.strip()} without quotes"
        elif isinstance(value, str) and self.options:
            hint = did_you_mean(value, self.options)
        return f"{self.name} = {value!r} is outside {self.range}{hint}"


def _short(value: float) -> str:
    return "inf" if value == math.inf else "-inf" if value == -math.inf else f"{value:g}"


def plain_number(value: Any) -> Any:
    """The Python number that a scalar of NumPy, or an array or tensor without dimensions, holds; else the value.

    A tensor whose gradient is wanted stays one.
    """
    if getattr(value, "shape", None) != () or getattr(value, "requires_grad", False) or not hasattr(value, "item"):
        return value
    return value.item()


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
    kind: str = "number",
) -> Any:
    """A float field: `low`/`high` are inclusive bounds, `above`/`below` exclusive ones."""
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
