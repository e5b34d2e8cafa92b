"""Which tensors a rule or a value is for: by name, role and place among the blocks.

A value that depends on the tensor is a list of cases, the first of which that matches counts:

    weight: [{match: "*mlp*", value: [0.2, 0.8]}, {layers: outside, value: 1}, 0.5]

A bare value stands for every tensor, null for none: a tensor that gets that far is an error.  Where no case
matches, the value is looked for in the next place (model, recipe, default).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.keys import Key, plays
from weightsmith.core.problem import Code, Problem, Tensors
from weightsmith.recipe.fields import OUTSIDE
from weightsmith.recipe.table import Table, file_of, table_of

__all__ = ["MISSING", "NoValueError", "applies", "choose", "is_cases"]

MISSING = object()
"""What `choose` returns where nothing is said about a tensor."""


class NoValueError(RecipeError):
    """A case says that no tensor may get as far as one did."""

    def __init__(self, parameter: str, tensors: Tensors) -> None:
        self.parameter, self.tensors = parameter, tensors
        rest = f"add a case for {tensors['it|them']}, or a value for the rest"
        super().__init__(Problem(Code.UNMATCHED, tensors.names[0], f"{parameter} has no value for {tensors}; {rest}"))

    def __reduce__(self) -> tuple[type[NoValueError], tuple[str, Tensors]]:  # type: ignore[override]
        return NoValueError, (self.parameter, self.tensors)


def is_cases(value: Any) -> bool:
    """Whether a parameter's value is a list of cases (a list of numbers is a ramp over depth)."""
    return isinstance(value, (list, tuple)) and any(v is None or isinstance(v, Mapping) for v in value)


def applies(key: Key, match: Sequence[str], role: Sequence[str] | None, layers: Sequence[int] | str | None) -> bool:
    """Whether a tensor is meant: one of the globs, one of the roles, in the blocks (None: wherever)."""
    if not any(fnmatchcase(key.name, pattern) for pattern in match):
        return False
    if role is not None and not any(plays(key.name, one) for one in role):
        return False
    if layers == OUTSIDE:
        return key.layer is None
    return layers is None or (key.layer is not None and int(layers[0]) <= key.layer < int(layers[1]))


def choose(value: Any, key: Key, model: str | None, parameter: str) -> Any:
    """What a parameter's value says about one tensor (and model): a value, a ramp, or MISSING.

    Raises RecipeError where a case says null.
    """
    if is_cases(value):
        for case in value:
            if case is None or (isinstance(case, Mapping) and case.get("value") is None and _meets(case, key)):
                raise NoValueError(parameter, Tensors([key.name]))
            if not isinstance(case, Mapping):
                return case
            if _meets(case, key):
                return choose(case["value"], key, model, parameter)
        return MISSING
    if isinstance(value, Table) or file_of(value) is not None:
        held = value if isinstance(value, Table) else table_of(parameter, value)
        found = held.at(key.name, model)
        return MISSING if found is None else found
    if isinstance(value, Mapping):
        found = value.get(model) if model is not None else None
        return MISSING if found is None else choose(found, key, model, parameter)
    return MISSING if value is None else value


def _meets(case: Mapping[str, Any], key: Key) -> bool:
    return applies(key, _words(case.get("match", "*")), _words(case.get("role")), case.get("layers"))


def _words(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value
