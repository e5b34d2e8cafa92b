"""From a recipe to the pipeline that each tensor gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.keys import Key
from weightsmith.core.method import Codec, Method, Parameter, Pipeline, Stage, registry
from weightsmith.recipe.cases import MISSING, applies, choose
from weightsmith.recipe.schema import Recipe, Rule, StageSpec

__all__ = ["Resolver", "ramp"]


def ramp(points: Sequence[float], depth: float) -> float:
    """Piecewise-linear value at depth 0..1 over equally spaced points."""
    if len(points) == 1:
        return float(points[0])
    place = min(max(depth, 0.0), 1.0) * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    share = place - left
    return float(points[left]) if share == 0 else float(points[left] * (1 - share) + points[left + 1] * share)


@dataclass(frozen=True)
class _Slot:
    """One stage of a pipeline with what was written inside it, whether a rule wrote it, or nobody did."""

    cls: type[Stage]
    inline: Mapping[str, Any]
    from_rule: bool
    implied: bool = False


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
        self._main = self._slots(recipe.method, from_rule=False)
        self._rules = [
            self._slots(rule.method, from_rule=True) if rule.method is not None else self._main for rule in recipe.rules
        ]
        self._excluded = self._slots((StageSpec(name="keep"),), from_rule=True)
        self._known: dict[tuple[Stage, ...], Pipeline] = {}
        self._check_names()

    def __call__(self, key: Key, depth: float | None) -> Pipeline:
        """The pipeline of one tensor, with every parameter a number.  Equal pipelines are one object."""
        rule, slots = self._rule(key)
        position = depth if depth is not None else (0.0 if key.role == "embed" else 1.0)
        stages = tuple(self._stage(slot, slots, rule, key, position) for slot in slots)
        if stages not in self._known:
            pipeline = Pipeline(stages)
            _ = pipeline.method  # raises unless there is exactly one, and everything stands where it belongs
            self._known[stages] = pipeline
        return self._known[stages]

    def _rule(self, key: Key) -> tuple[Rule | None, tuple[_Slot, ...]]:
        if any(fnmatchcase(key.name, pattern) for pattern in self.recipe.exclude):
            return None, self._excluded
        for rule, slots in zip(self.recipe.rules, self._rules, strict=True):
            if applies(key, rule.match, rule.role, rule.layers):
                return rule, slots
        return None, self._main

    def _slots(self, specs: Sequence[StageSpec], *, from_rule: bool) -> tuple[_Slot, ...]:
        slots = tuple(_Slot(registry(spec.name), spec.parameters, from_rule) for spec in specs)
        return _completed(slots)

    def _stage(self, slot: _Slot, slots: Sequence[_Slot], rule: Rule | None, key: Key, position: float) -> Stage:
        values: dict[str, Any] = {}
        for parameter in slot.cls.parameters():
            name, inline = parameter.name, slot.inline.get(parameter.name)
            places = [inline] if slot.from_rule else []
            if rule is not None and name in rule.parameters and _claims(slot, slots, name):
                places.append(rule.parameters[name])
            if inline is not None:
                places += [] if slot.from_rule else [inline]
            else:
                own = {n: ref.parameters[name] for n, ref in self.recipe.models.items() if name in ref.parameters}
                if own and parameter.each and _claims(slot, slots, name):
                    places.append(own)
                if name in self.recipe.parameters and _claims(slot, slots, name):
                    places.append(self.recipe.parameters[name])
            value = self._value(parameter, [p for p in places if p is not None], key, position)
            if value is not None:
                values[parameter.field] = value
        return slot.cls(**values)

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

    def _check_names(self) -> None:
        """Every parameter in the recipe belongs to some stage that can use it."""
        groups = [self._main, *self._rules]
        known = {p.name for slots in groups for slot in slots for p in slot.cls.parameters()}
        each = {p.name for slots in groups for slot in slots for p in slot.cls.parameters() if p.each}
        problems = []
        for where, names, options in [
            ("parameters", self.recipe.parameters, known),
            *((f"models.{n}", ref.parameters, each) for n, ref in self.recipe.models.items()),
            *((f"rules[{i}].parameters", rule.parameters, known) for i, rule in enumerate(self.recipe.rules)),
        ]:
            problems += [
                f"{where}: unknown parameter {n!r}{did_you_mean(n, options)}" for n in names if n not in options
            ]
        for slots in groups:
            for slot in slots:
                own = {p.name for p in slot.cls.parameters()}
                problems += [
                    f"{slot.cls.traits.name}: unknown parameter {n!r}{did_you_mean(n, own)}"
                    for n in slot.inline if n not in own
                ]  # fmt: skip
        if problems:
            raise RecipeError("\n".join(dict.fromkeys(problems)))


def _completed(slots: tuple[_Slot, ...]) -> tuple[_Slot, ...]:
    """Filters and codecs alone are put around plain task arithmetic: `dare` means `dare | task_arithmetic`."""
    for slot in slots:
        if slot.cls.traits.alone and len(slots) > 1:
            name = slot.cls.traits.name
            raise RecipeError(f"{name} stores the models' own changes; it takes no other stage beside it")
    if any(issubclass(slot.cls, Method) for slot in slots):
        return slots
    behind = tuple(s for s in slots if s.cls.traits.after or issubclass(s.cls, Codec))
    before = tuple(s for s in slots if s not in behind)
    return (*before, _Slot(registry("task_arithmetic"), {}, slots[0].from_rule, implied=True), *behind)


def _claims(slot: _Slot, slots: Sequence[_Slot], name: str) -> bool:
    """Whether a value from outside the stages goes to this one: the stages that set it inline do not compete."""
    takers = [s for s in slots if any(p.name == name for p in s.cls.parameters())]
    # `consensus` with a lambda means its own, not that of the sum it is put behind.
    takers = [s for s in takers if not s.implied] or takers
    rivals = [s for s in takers if name not in s.inline]
    if name in slot.inline:
        return not rivals
    if len(rivals) > 1:
        raise RecipeError(
            f"parameter {name!r} belongs to {' and '.join(s.cls.traits.name for s in rivals)}; "
            f"write it inside the stage it is meant for"
        )
    return any(s is slot for s in rivals)


def _number(value: Any, position: float) -> Any:
    if isinstance(value, (list, tuple)):
        return ramp(value, position)
    return value


def _default(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, tuple) else value
