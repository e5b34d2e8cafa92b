"""From a recipe to the pipeline that each tensor gets."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from weightsmith.core.keys import Key
from weightsmith.core.method import Parameter, Pipeline, Stage, registry
from weightsmith.core.parameter import blend
from weightsmith.recipe.cases import MISSING, applies, choose
from weightsmith.recipe.check import Slot, claimants, completed
from weightsmith.recipe.fields import KEEP, StageSpec
from weightsmith.recipe.schema import Recipe, Rule

__all__ = ["Resolver", "ramp"]

_Asked = Sequence[tuple[Parameter, Sequence[Any]]]
_Stages = Sequence[tuple[type[Stage], _Asked]]


def ramp(points: Sequence[float], depth: float) -> float:
    """Piecewise-linear value at depth 0..1 over equally spaced points."""
    if len(points) == 1:
        return blend(points[0], points[0], 0)
    place = min(max(depth, 0.0), 1.0) * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    return blend(points[left], points[left + 1], place - left)


class Resolver:
    """Answers `resolver(key, depth) -> Pipeline` for one recipe.

    A value is looked for in this order: inside the rule's own method, the rule's `parameters`, inside the
    recipe's method, the model's own entry (for parameters that may differ between models), the recipe's
    `parameters`, the default; a list of cases none of which matches the tensor says nothing.  Outside the blocks
    a ramp has its first value for embeddings and its last for everything else (final norm, head).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.names = tuple(recipe.models)
        main = _slots(recipe.method)
        self._main = self._asked(main, None, own=False)
        self._rules = [
            self._asked(main, rule, own=False)
            if rule.method is None
            else self._asked(_slots(rule.method), rule, own=True)
            for rule in recipe.rules
        ]
        self._excluded = self._asked(_slots((StageSpec(name=KEEP),)), None, own=True)
        self._known: dict[tuple[Stage, ...], Pipeline] = {}

    def __call__(self, key: Key, depth: float | None) -> Pipeline:
        """The pipeline of one tensor, with every parameter a number.  Equal pipelines are one object."""
        position = depth if depth is not None else (0.0 if key.role == "embed" else 1.0)
        stages = tuple(self._stage(cls, asked, key, position) for cls, asked in self._stages_of(key))
        if stages not in self._known:
            pipeline = Pipeline(stages)
            _ = pipeline.method  # raises unless there is exactly one, and everything stands where it belongs
            self._known[stages] = pipeline
        return self._known[stages]

    def dtype(self, key: Key) -> str | None:
        """How a rule says that a tensor is stored; None where none does."""
        rules = (rule for rule in self.recipe.rules if rule.dtype is not None)
        return next((r.dtype for r in rules if applies(key, r.match, r.role, r.layers)), None)

    def singles_out(self, key: Key, neighbour: Key) -> bool:
        """Whether a rule says how to merge this tensor, and not the same of its neighbour."""
        for rule in self.recipe.rules:
            if rule.method is not None and applies(key, rule.match, rule.role, rule.layers):
                return not applies(neighbour, rule.match, rule.role, rule.layers)
        return False

    def _stages_of(self, key: Key) -> _Stages:
        if any(fnmatchcase(key.name, pattern) for pattern in self.recipe.exclude):
            return self._excluded
        for rule, stages in zip(self.recipe.rules, self._rules, strict=True):
            if rule.of_method and applies(key, rule.match, rule.role, rule.layers):
                return stages
        return self._main

    def _stage(self, cls: type[Stage], asked: _Asked, key: Key, position: float) -> Stage:
        found = {parameter.field: self._value(parameter, places, key, position) for parameter, places in asked}
        return cls(**{field: value for field, value in found.items() if value is not None})

    def _asked(self, slots: Sequence[Slot], rule: Rule | None, *, own: bool) -> _Stages:
        """The stages, with the places that are asked for the value of each parameter; `own`: the rule's own method."""
        return [
            (slot.cls, [(p, self._places(p, slot, slots, rule, own)) for p in slot.cls.parameters()])
            for slot in slots
            if slot.cls is not None
        ]

    def _places(
        self, parameter: Parameter, slot: Slot, slots: Sequence[Slot], rule: Rule | None, own: bool
    ) -> list[Any]:
        name, inline = parameter.name, slot.inline.get(parameter.name)
        claimed = any(one is slot for one in claimants(slots, name))
        of_rule = rule.parameters.get(name) if claimed and rule is not None else None
        if inline is not None:  # a rule replaces what the recipe's method says, not what its own does
            places = [inline, of_rule] if own else [of_rule, inline]
        elif claimed:
            models = {n: ref.parameters[name] for n, ref in self.recipe.models.items() if name in ref.parameters}
            places = [of_rule, models if models and parameter.each else None, self.recipe.parameters.get(name)]
        else:
            places = []
        return [place for place in places if place is not None]

    def _value(self, parameter: Parameter, places: Sequence[Any], key: Key, position: float) -> Any:
        """First answer wins; for a per-model parameter each model looks for itself."""

        def first(model: str | None) -> Any:
            answers = (choose(place, key, model, parameter.name) for place in places)
            found = next((answer for answer in answers if answer is not MISSING), None)
            return None if found is None else _number(found, position)

        if not places or not parameter.each:
            return first(None)
        each = []
        for i, name in enumerate(self.names):
            found = first(name)
            each.append(_default(parameter.default, i) if found is None else found)
        return each[0] if len(set(each)) == 1 else tuple(each)


def _slots(specs: Sequence[StageSpec]) -> Sequence[Slot]:
    return completed([Slot(registry(spec.name), spec.name, spec.parameters) for spec in specs])


def _number(value: Any, position: float) -> Any:
    if isinstance(value, (list, tuple)):
        return ramp(value, position)
    return value


def _default(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, tuple) else value
