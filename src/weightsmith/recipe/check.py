"""What a file says about methods and their parameters, checked against the methods themselves.

Works on values as written, so that all that is wrong comes out together, however much else is wrong with the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.method import Codec, Method, Parameter, Pipeline, Stage, registry
from weightsmith.recipe.aliases import expand
from weightsmith.recipe.cases import is_cases
from weightsmith.recipe.fields import Case, StageSpec
from weightsmith.recipe.grammar import PYTHON, Fault, unknown
from weightsmith.recipe.reader import Location, plain_scalar, spell

__all__ = ["KEEP", "Checker", "Slot", "claimants", "completed", "method_faults", "written"]

KEEP = "keep"
"""The one-word treatment of a rule that takes the base's tensor."""


# --- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slot:
    """One stage of a pipeline as written.

    cls      None where no method has the name
    inline   the parameters inside it, and `inside` their location
    implied  nobody wrote it, see `completed`
    """

    cls: type[Stage] | None
    name: str
    inline: Mapping[str, Any]
    inside: Location = ()
    implied: bool = False

    def parameter(self, name: str) -> Parameter | None:
        specs = self.cls.parameters() if self.cls is not None else ()
        return next((p for p in specs if p.name == name), None)


def completed(slots: Sequence[Slot]) -> Sequence[Slot]:
    """Filters and codecs alone are put around plain task arithmetic: `dare` means `dare | task_arithmetic`."""
    if any(slot.cls is not None and issubclass(slot.cls, Method) for slot in slots):
        return slots
    behind = [s for s in slots if s.cls is not None and (s.cls.traits.after or issubclass(s.cls, Codec))]
    before = [s for s in slots if s not in behind]
    return [*before, Slot(registry("task_arithmetic"), "task_arithmetic", {}, implied=True), *behind]


def claimants(slots: Sequence[Slot], name: str) -> list[Slot]:
    """The stages that a parameter written outside them may go to: those that do not set it inside, if there are any."""
    takers = [s for s in slots if s.parameter(name) is not None]
    takers = [s for s in takers if not s.implied] or takers  # the lambda of `consensus` is its own, not its sum's
    return [s for s in takers if name not in s.inline] or takers


def written(method: Any, location: Location) -> Iterator[tuple[str, Any, Location, Location]]:
    """Name, parameters, and the locations of both, of every stage that is written as one; others are faults by type."""
    listed = isinstance(method, (list, tuple))
    for i, stage in enumerate(method if listed else [method]):
        here = (*location, i) if listed else location
        if isinstance(stage, StageSpec):
            yield stage.name, stage.parameters, here, here
        elif isinstance(stage, str):
            yield stage, {}, here, here
        elif isinstance(stage, Mapping) and "name" in stage:
            if isinstance(stage["name"], str):
                yield stage["name"], stage.get("parameters"), here, (*here, "parameters")
        elif isinstance(stage, Mapping) and len(stage) == 1:
            ((name, parameters),) = stage.items()
            yield name, parameters, here, (*here, name)


# --- checks ----------------------------------------------------------------------------------------


def method_faults(tree: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]], keys: Iterable[str]) -> list[Fault]:
    """Faults of methods and parameters, wherever a recipe may name them.

    own   model -> the parameters that stand with it
    keys  what else may stand there
    """
    check = Checker(own)
    main = check.stages(tree.get("method", ()), ("method",))
    rules = [_parts(rule) for rule in _list(tree.get("rules"))]
    replaced = [
        main if rule.get("method") is None else check.stages(rule["method"], ("rules", i, "method"))
        for i, rule in enumerate(rules)
    ]
    groups = [main, *(group for group in replaced if group is not main)]
    for slot in (slot for group in groups for slot in group):
        check.inside(slot)
    check.outside(tree.get("parameters"), ("parameters",), groups)
    for name, parameters in own.items():
        check.outside(parameters, ("models", name), groups, keys=tuple(keys))
    for i, (rule, group) in enumerate(zip(rules, replaced, strict=True)):
        check.outside(rule.get("parameters"), ("rules", i, "parameters"), [group], replaces=True)
    return check.faults


class Checker:
    """Collects the faults of methods and parameters.

    models  their names
    ramps   a list is a ramp over depth; else it is one value per model
    """

    def __init__(self, models: Collection[str], *, ramps: bool = True) -> None:
        self.models, self.ramps = models, ramps
        self.faults: list[Fault] = []

    def say(self, location: Location, text: str, form: str = "said") -> None:
        self.faults.append(Fault(location, text, form))

    def stages(self, method: Any, location: Location) -> list[Slot]:
        """The stages of a pipeline; it has one method, filters and codecs alone are put around task arithmetic."""
        slots: list[Slot] = []
        for name, parameters, here, inside in written(method, location):
            for stage, own in expand(name, parameters if isinstance(parameters, Mapping) else {}):
                cls = None
                try:
                    cls = registry(stage)
                except RecipeError as error:
                    self.say(here, f"{error}" if here == ("method",) else f"{error} (in {spell(here)})")
                slots.append(Slot(cls, stage, own, inside))
        if not slots or any(slot.cls is None for slot in slots):
            return slots
        for slot in slots:
            if slot.cls is not None and slot.cls.traits.alone and len(slots) > 1:
                self.say(location, f"{slot.name} stores the models' own changes; it takes no other stage beside it")
                return slots
        slots = list(completed(slots))
        try:
            _ = Pipeline(tuple(slot.cls() for slot in slots if slot.cls is not None)).method
        except RecipeError as error:
            self.say(location, f"{spell(location)}: {error}")
        return slots

    def inside(self, slot: Slot) -> None:
        """Check the parameters written inside a stage."""
        if slot.cls is None:
            return
        known = [p.name for p in slot.cls.parameters()]
        for name, value in slot.inline.items():
            here, spec = (*slot.inside, name), slot.parameter(name)
            if spec is None:
                self.unknown(here, known, [slot])
            else:
                self.value(spec, value, here, slot.name)

    def outside(
        self,
        values: Any,
        location: Location,
        groups: Sequence[Sequence[Slot]],
        *,
        keys: Sequence[str] | None = None,
        replaces: bool = False,
    ) -> None:
        """Check parameters written outside the stages.

        keys      they stand with a model, beside these keys
        replaces  they replace what is written inside the stages, as those of a rule do
        """
        if not isinstance(values, Mapping):
            return  # absent, or a fault by type
        slots = [slot for group in groups for slot in group]
        known = {p.name: p for slot in slots if slot.cls is not None for p in slot.cls.parameters()}
        offered = [p.name for p in known.values() if p.each or keys is None] + list(keys or ())
        for name, value in values.items():
            here = (*location, name)
            if name not in known:
                # An unknown method may have any parameter, but hardly one that looks like a misspelt other.
                certain = bool(slots) and all(slot.cls is not None for slot in slots)
                if certain or difflib.get_close_matches(name, offered, n=1, cutoff=0.75):
                    self.unknown(here, offered, slots)
                continue
            for slot in self.takers(name, groups, here, replaces=replaces):
                spec = slot.parameter(name)
                assert spec is not None
                if keys is None:
                    self.value(spec, value, here, slot.name)
                elif not spec.each:
                    self.say(
                        here,
                        f"{slot.name} takes one {name} for all models; move it from {spell(location)} to parameters",
                    )
                elif isinstance(value, Mapping):
                    self.say(here, "is for this model alone; it takes a number, not a mapping", "value")
                else:
                    self.value(spec, value, here, slot.name)

    def takers(self, name: str, groups: Sequence[Sequence[Slot]], here: Location, *, replaces: bool) -> list[Slot]:
        """The stages that a value from outside goes to: in each pipeline the one that does not set it inside."""
        found: dict[type[Stage] | None, Slot] = {}
        for group in groups:
            claims = claimants(group, name)
            rivals = [s for s in claims if name not in s.inline]
            if len(rivals) > 1:
                names = " and ".join(dict.fromkeys(s.name for s in rivals))
                self.say(here, f"{name!r} belongs to {names}; write it inside the stage it is meant for, "
                               f"as {{{rivals[0].name}: {{{name}: ...}}}}")  # fmt: skip
                return []
            found |= {s.cls: s for s in rivals or (claims if replaces else [])}
        if not found:
            owner = next(s.name for group in groups for s in group if s.parameter(name) is not None)
            again = spell(here[:-1])
            self.say(here, f"{name!r} is set inside the stage {owner!r} and again in {again}; keep one of them")
        return list(found.values())

    def unknown(self, location: Location, known: Sequence[str], slots: Iterable[Slot]) -> None:
        if known:
            self.faults.append(unknown(location, known))
        else:
            names = ", ".join(dict.fromkeys(slot.name for slot in slots))
            self.faults.append(
                Fault(location, f"unknown key {location[-1]!r}", "unknown", f"; {names} takes no parameters")
            )

    # -- values

    def value(self, spec: Parameter, value: Any, location: Location, who: str, *, nested: bool = False) -> None:
        """One value, a ramp over depth, cases by tensor, or one of these per model."""
        if self.ramps and is_cases(value):
            self.cases(spec, value, location, who, nested=nested)
        elif isinstance(value, Mapping):
            if nested:
                self.say(location, "takes a number or a list of numbers, not a mapping", "value")
            elif not spec.each:
                self.say(location, f"{who} takes one {spec.name} for all models, not one per model")
            else:
                self.per_model(spec, value, location, who)
        elif isinstance(value, (list, tuple)):
            self.ramp(spec, value, location, who) if self.ramps else self.each(spec, value, location, who)
        elif text := spec.check(value):
            self.say(location, f"{who}: {text}")

    def per_model(self, spec: Parameter, values: Mapping[str, Any], location: Location, who: str) -> None:
        for name, value in values.items():
            here = (*location, name)
            if name not in self.models:
                hint = did_you_mean(str(name), self.models)
                self.faults.append(Fault(here, f"unknown model {name!r}", "unknown", hint))
            else:
                self.value(spec, value, here, who, nested=True)

    def cases(self, spec: Parameter, cases: Sequence[Any], location: Location, who: str, *, nested: bool) -> None:
        for i, case in enumerate(cases):
            here = (*location, i)
            if not isinstance(case, Mapping):
                if i + 1 < len(cases):
                    self.say(here, "is for every tensor, so that the cases behind it never count; put it last", "value")
                value, inside = case, here
            else:
                value, inside = case.get("value"), (*here, "value")
                try:
                    Case.model_validate(case)
                except ValidationError as error:
                    faults = [Fault.caught(detail, Case, PYTHON) for detail in error.errors(include_url=False)]
                    self.faults += [fault._replace(location=(*here, *fault.location)) for fault in faults]
            if value is not None:
                self.value(spec, value, inside, who, nested=nested)

    def ramp(self, spec: Parameter, points: Sequence[Any], location: Location, who: str) -> None:
        if spec.kind != "number":
            self.say(
                location, f"{who}: {spec.name} takes one value ({spec.range}), not a list; lists of numbers are ramps"
            )
        elif not points:
            self.say(location, f"{who}: {spec.name} is an empty list; a ramp needs at least one number")
        for i, point in enumerate(points if spec.kind == "number" else ()):
            if isinstance(point, str) and isinstance(plain_scalar(point), str):
                self.say((*location, i), f"{who}: {spec.name} holds {point!r}; a ramp over depth takes numbers only")
            elif text := spec.check(point):
                self.say((*location, i), f"{who}: {text}")

    def each(self, spec: Parameter, values: Sequence[Any], location: Location, who: str) -> None:
        """One value per model, in their order."""
        if len(values) != len(self.models):
            self.say(location, f"{who}: {spec.name} has {len(values)} values for {len(self.models)} models")
        for i, value in enumerate(values):
            if text := spec.check(value):
                self.say((*location, i), f"{who}: {text}")


def _parts(rule: Any) -> Mapping[str, Any]:
    """A rule's method and parameters, as written or as a model."""
    return rule if isinstance(rule, Mapping) else {k: getattr(rule, k, None) for k in ("method", "parameters")}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
