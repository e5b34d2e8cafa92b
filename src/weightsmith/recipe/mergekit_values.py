"""mergekit's parameter settings as native values: numbers, ramps over depth, cases by tensor.

There, a setting is a number, a list of numbers (a gradient over the layers of a slice), or a list of
{filter, value} whose filter is a part of the tensor's name; where no filter matches, the next level (source,
slice, module, top) is asked.  Outside the layers a gradient has its first value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.recipe.fields import OUTSIDE
from weightsmith.recipe.mergekit_methods import REQUIRED, Setting
from weightsmith.recipe.reader import Location, plain_scalar

__all__ = ["Bad", "Level", "Window", "native_value"]


class Bad(Exception):
    """What is wrong with a setting, and where."""

    def __init__(self, location: Location, text: str) -> None:
        super().__init__(text)
        self.location, self.text = location, text


@dataclass(frozen=True)
class Level:
    """One level's `parameters`, and its location in the document."""

    values: Mapping[str, Any]
    location: Location


@dataclass(frozen=True)
class Window:
    """Where a slice's layers stand in the names that filters are for: `start` there is 0 in the slice."""

    start: int = 0
    length: int = 0


def native_value(name: str, setting: Setting, levels: Sequence[Level], window: Window) -> Any:
    """What all levels together say, the highest first, as one native value; None if nothing is said.

    Raises Bad.
    """
    cases: list[Any] = []
    for filter, value, location in _said(name, levels):
        if filter is None:
            rest = _cases(setting, value, location, {})
            return rest[-1] if not cases and len(rest) == 1 else [*cases, *rest]
        match = _globs(filter, window, location)
        if match:
            # In a slice, the blocks of a filter may be those of another one.
            more = {"optional": True} if window.start or _layer_number(filter) else {}
            cases += _cases(setting, value, location, {"match": match[0] if len(match) == 1 else match, **more})
    if not cases:
        return None
    if setting.default is REQUIRED:
        return [*cases, None]  # a tensor that no filter matches is an error, as there
    return cases if setting.default is None else [*cases, setting.convert(setting.default)]


def _said(name: str, levels: Sequence[Level]) -> Iterator[tuple[str | None, Any, Location]]:
    """(filter or None, value, location) in the order in which they are asked."""
    for level in levels:
        if level.values.get(name) is None:
            continue
        value, location = level.values[name], (*level.location, name)
        conditions = [value] if isinstance(value, Mapping) else value
        if not isinstance(conditions, list) or not any(isinstance(c, Mapping) for c in conditions):
            yield None, value, location
            continue
        for i, condition in enumerate(conditions):
            here = location if isinstance(value, Mapping) else (*location, i)
            if not isinstance(condition, Mapping) or "value" not in condition:
                raise Bad(here, f"should be {{filter: ..., value: ...}}, is {condition!r}")
            for key in condition.keys() - {"filter", "value"}:
                raise Bad((*here, key), f"unknown key {key!r} beside filter and value")
            filter = condition.get("filter")
            yield None if filter in (None, "*", "") else str(filter), condition["value"], (*here, "value")


def _cases(setting: Setting, value: Any, location: Location, selector: Mapping[str, Any]) -> list[Any]:
    """One value as native cases: two where a gradient has to start anew outside the layers."""
    points = [_scalar(setting, v, location) for v in (value if isinstance(value, list) else [value])]
    if not points:
        raise Bad(location, "is an empty list; a gradient needs at least one value")
    if setting.kind is not float and len(points) > 1:
        raise Bad(location, f"a list is a gradient over layers, which {setting.kind.__name__} values cannot follow; "
                         f"write one value, or filters")  # fmt: skip
    inside: Any = points[0] if len(set(points)) == 1 else points
    outside = [{**selector, "layers": OUTSIDE, "value": points[0]}] if isinstance(inside, list) else []
    return [*outside, {**selector, "value": inside} if selector else inside]


def _scalar(setting: Setting, value: Any, location: Location) -> Any:
    """A number or flag, however YAML writes it ('1e-5' and "0.5" are numbers, 1 is true for a flag)."""
    plain = plain_scalar(value) if isinstance(value, str) else value
    if setting.kind is bool and plain in (0, 1):
        return setting.convert(bool(plain))
    if setting.kind is not bool and isinstance(plain, (int, float)) and not isinstance(plain, bool):
        return setting.convert(int(plain) if setting.kind is int and plain == int(plain) else plain)
    wanted = {bool: "true or false", int: "a whole number"}.get(setting.kind, "a number")
    raise Bad(location, f"should be {wanted}, is {value!r}")


def _globs(filter: str, window: Window, location: Location) -> list[str]:
    """The globs that match the slice's names where the filter is a part of the model's own names."""
    if not window.start or not (found := _layer_number(filter)):
        return [f"*{_literal(filter)}*"]
    before, digits, after = filter[: found.start()], found[0], filter[found.end() :]
    if not before:
        raise Bad(location, f"filter {filter!r} begins with a number; write the word before it too, as layers.{filter}")
    numbers = range(window.start, window.start + window.length)
    meant = [n for n in numbers if (str(n) == digits if after else str(n).startswith(digits))]
    return [f"*{_literal(before)}{n - window.start}{_literal(after or '.')}*" for n in meant]


def _layer_number(filter: str) -> re.Match[str] | None:
    """The first whole component of digits that does not count experts."""
    for found in re.finditer(r"(?:^|(?<=\.))\d+(?=\.|$)", filter):
        if not filter[: found.start()].endswith("experts."):
            return found
    return None


def _literal(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)
