"""What a file says about methods and their parameters, checked against the methods themselves.

Works on values as written, so that all that is wrong comes out together, however much else is wrong with the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from weightsmith.core.elsewhere import elsewhere
from weightsmith.core.errors import RecipeError, closest, did_you_mean
from weightsmith.core.method import Codec, MergedFilter, Method, Parameter, Pipeline, Stage, StandaloneCodec, registry
from weightsmith.core.parameter import plain_number
from weightsmith.recipe.aliases import PIPELINES, expand, stage_called, stage_names
from weightsmith.recipe.cases import is_cases
from weightsmith.recipe.fields import Case, StageSpec
from weightsmith.recipe.grammar import PYTHON, Fault, Grammar, listing, mapping
from weightsmith.recipe.reader import Location, plain_scalar, spell
from weightsmith.recipe.table import Table, file_of

__all__ = ["Checker", "Slot", "claimants", "completed", "method_faults", "stages_written", "written"]


# --- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slot:
    """One stage of a pipeline as written.

    cls      None where no method has the name
    inline   the parameters inside it, and `inside` their location
    implied  nobody wrote it, see `completed`
    guessed  no method has the name that is written; `cls` and `name` are the nearest one's
    """

    cls: type[Stage] | None
    name: str
    inline: Mapping[str, Any]
    inside: Location = ()
    implied: bool = False
    guessed: bool = False

    @property
    def certain(self) -> bool:
        return self.cls is not None and not self.guessed

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return {} if self.cls is None else {p.name: p for p in self.cls.parameters()}


def completed(slots: Sequence[Slot]) -> Sequence[Slot]:
    """Filters and codecs alone are put around plain task arithmetic: `dare` means `dare | task_arithmetic`."""
    if any(slot.cls is not None and issubclass(slot.cls, Method) for slot in slots):
        return slots
    after = [s for s in slots if s.cls is not None and issubclass(s.cls, (MergedFilter, Codec))]
    implied = Slot(registry("task_arithmetic"), "task_arithmetic", {}, implied=True)
    return [*(s for s in slots if s not in after), implied, *after]


def claimants(slots: Sequence[Slot], name: str) -> list[Slot]:
    """The stages that a parameter written outside them may go to: those that do not set it inside, if there are any."""
    takers = [s for s in slots if name in s.parameters]
    takers = [s for s in takers if not s.implied] or takers  # the lambda of `consensus` is its own, not its sum's
    return [s for s in takers if name not in s.inline] or takers


def written(method: Any, location: Location = ("method",)) -> Iterator[tuple[str, Any, Location, Location]]:
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
                yield stage["name"], mapping(stage.get("parameters")), here, (*here, "parameters")
        elif isinstance(stage, Mapping) and len(stage) == 1:
            ((name, parameters),) = stage.items()
            yield name, mapping(parameters), here, (*here, name)


def stages_written(method: Any) -> Mapping[str, type[Stage]]:
    """Name -> stage of a method as written, misspelt ones by the nearest names; empty where one is not known at all."""
    slots = Checker(()).slots(method, (), stage_called, stage_names)
    return {slot.name: slot.cls for slot in slots if slot.cls is not None} if all(slot.cls for slot in slots) else {}


# --- checks ----------------------------------------------------------------------------------------


def method_faults(tree: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]], keys: Iterable[str]) -> list[Fault]:
    """Faults of methods and parameters, wherever a recipe may name them.

    own   model -> the parameters that stand with it
    keys  what else may stand there
    """
    check = Checker(own)
    main = check.pipeline(tree.get("method", ()), ("method",))
    rules = [dict(r) if isinstance(r, Grammar) else mapping(r) for r in listing(tree.get("rules"))]
    of_rules = [
        main if rule.get("method") is None else check.pipeline(rule["method"], ("rules", i, "method"))
        for i, rule in enumerate(rules)
    ]
    groups = [main, *(group for group in of_rules if group is not main)]
    check.outside(tree.get("parameters"), ("parameters",), groups)
    check.with_models(own, groups, tuple(keys))
    for i, (rule, group) in enumerate(zip(rules, of_rules, strict=True)):
        check.outside(rule.get("parameters"), ("rules", i, "parameters"), [group], replaces=True)
    return check.faults


class Checker:
    """Collects the faults of methods and parameters.

    models  their names
    ramps   a list is a ramp over depth; else it is one value per model
    """

    def __init__(self, models: Iterable[str], *, ramps: bool = True) -> None:
        self.models, self.ramps = tuple(models), ramps
        self.faults: list[Fault] = []
        self._said = set[tuple[Location, str]]()

    def say(self, location: Location, text: str, form: str = "said", hint: str = "") -> None:
        self.faults.append(Fault(location, text, form, hint))

    def slots(
        self,
        method: Any,
        location: Location,
        look_up: Callable[[str], type[Stage]],
        names: Callable[[], Iterable[str]],
    ) -> list[Slot]:
        """The stages as written, with what is inside them checked; a misspelt one is taken for the nearest of `names`.

        So the parameters of a misspelt method are checked in the same round as its name.
        """
        slots = []
        for word, parameters, here, inside in written(method, location):
            name = word
            try:
                _ = word in PIPELINES or look_up(word)
            except RecipeError as error:
                self.say(here, f"{error}" if here == ("method",) else f"{error} (in {spell(here)})", "stage")
                name = "" if elsewhere(word) or word in stage_names() else closest(word, names()) or ""
            for stage, own in expand(name, parameters) if look_up is stage_called else [(name, parameters)]:
                slots.append(Slot(look_up(stage) if stage else None, stage or word, own, inside, guessed=name != word))
        for slot in slots:
            self.inside(slot)
        return slots

    def pipeline(self, method: Any, location: Location) -> Sequence[Slot]:
        """The stages of a pipeline, completed, if they are known and go together."""
        slots = self.slots(method, location, stage_called, stage_names)
        classes = [slot.cls for slot in slots if slot.cls is not None]
        if not slots or len(classes) < len(slots):
            return slots
        alone = next((cls.traits.name for cls in classes if issubclass(cls, StandaloneCodec)), None)
        if alone and len(slots) > 1:
            self.say(location, f"{alone} stores the models' own changes; it takes no other stage beside it")
            return slots
        whole = completed(slots)
        try:
            _ = Pipeline(tuple(slot.cls() for slot in whole if slot.cls is not None)).method
        except RecipeError as error:
            self.say(location, f"{spell(location)}: {error}")
        return whole

    def inside(self, slot: Slot) -> None:
        """Check the parameters written inside a stage."""
        for name, value in slot.inline.items() if slot.cls is not None else ():
            if name in slot.parameters:
                self.value(slot.parameters[name], value, (*slot.inside, name), slot.name)
            else:
                self.unknown((*slot.inside, name), slot.parameters, [slot])

    def with_models(
        self, own: Mapping[str, Mapping[str, Any]], groups: Sequence[Sequence[Slot]], keys: Sequence[str]
    ) -> None:
        """Check the parameters that stand with a model, beside the keys that are no parameters."""
        for model, values in own.items():
            self.outside(values, ("models", model), groups, keys=keys)

    def outside(
        self,
        values: Any,
        location: Location,
        groups: Sequence[Sequence[Slot]],
        *,
        keys: Sequence[str] | None = None,
        replaces: bool = False,
    ) -> None:
        """Check parameters written outside the stages; those of a rule replace what is written inside."""
        slots = [slot for group in groups for slot in group]
        known = {name: p for slot in slots for name, p in slot.parameters.items()}
        offered = [p.name for p in known.values() if p.each or keys is None] + list(keys or ())
        for name, value in mapping(values).items():
            here = (*location, name)
            if name not in known:
                self.unknown(here, offered, slots)
                continue
            for slot in self.takers(name, groups, here, replaces=replaces):
                if keys is not None and not slot.parameters[name].each:
                    where = spell(location)
                    self.say(here, f"{slot.name} takes one {name} for all models; move it from {where} to parameters")
                elif keys is not None and isinstance(value, Mapping):
                    self.say(here, "is for this model alone; it takes a number, not a mapping", "value")
                else:
                    self.value(slot.parameters[name], value, here, slot.name)

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
            owner = next(s.name for group in groups for s in group if name in s.parameters)
            again = spell(here[:-1])
            inside = ".".join(map(str, next(s.inside for g in groups for s in g if name in s.inline)))
            self.say(here, f"{name!r} is set inside the stage {owner!r} and again in {again}; keep one of them "
                           f"(--set {inside}.{name}=... changes the one inside)")  # fmt: skip
        return list(found.values())

    def unknown(self, location: Location, known: Collection[str], slots: Collection[Slot]) -> None:
        key = str(location[-1])
        # An unknown method may have any parameter, but hardly one that looks like a misspelt other.
        certain = bool(slots) and all(slot.certain for slot in slots)
        if not certain and not difflib.get_close_matches(key, known, n=1, cutoff=0.75):
            return
        nothing = f"; {', '.join(dict.fromkeys(slot.name for slot in slots))} takes no parameters"
        self.say(location, f"unknown key {key!r}", "unknown", did_you_mean(key, known) or nothing)

    # -- values

    def value(self, spec: Parameter, value: Any, location: Location, who: str, *, nested: bool = False) -> None:
        """One value, a ramp over depth, cases by tensor, or one of these per model."""
        if isinstance(value, Table) or (file_of(value) is not None and spec.kind == "number"):
            return  # read, and checked, where its path is known
        if self.ramps and is_cases(value):
            for i, case in enumerate(value):
                self.case(spec, case, (*location, i), who, nested=nested, last=i + 1 == len(value))
        elif isinstance(value, Mapping) and nested:
            self.say(location, "takes a number or a list of numbers, not a mapping", "value")
        elif isinstance(value, Mapping) and not spec.each:
            self.say(location, f"{who} takes one {spec.name} for all models, not one per model")
        elif isinstance(value, Mapping):
            for name, one in value.items():
                if name in self.models:
                    self.value(spec, one, (*location, name), who, nested=True)
                else:
                    hint = did_you_mean(str(name), self.models)
                    self.say((*location, name), f"unknown model {name!r}", "unknown", hint)
        elif isinstance(value, (list, tuple)) and self.ramps:
            self.ramp(spec, value, location, who)
        elif isinstance(value, (list, tuple)):
            if len(value) != len(self.models):
                self.say(location, f"{who}: {spec.name} has {len(value)} values for {len(self.models)} models")
            for i, one in enumerate(value):
                self.one(spec, one, (*location, i), who)
        else:
            self.one(spec, value, location, who)

    def one(self, spec: Parameter, value: Any, location: Location, who: str) -> None:
        text = spec.check(plain_number(value))
        # Of two stages that take the same value the first one says it.
        if text and (location, text) not in self._said:
            self._said.add((location, text))
            self.say(location, f"{who}: {text}")

    def case(self, spec: Parameter, case: Any, location: Location, who: str, *, nested: bool, last: bool) -> None:
        value, inside = case, location
        if isinstance(case, Mapping):
            value, inside = case.get("value"), (*location, "value")
            try:
                Case.model_validate(case)
            except ValidationError as error:
                faults = [Fault.caught(detail, Case, PYTHON) for detail in error.errors(include_url=False)]
                self.faults += [fault._replace(location=(*location, *fault.location)) for fault in faults]
        elif not last:
            self.say(location, "is for every tensor, so that the cases behind it never count; put it last", "value")
        if value is not None:
            self.value(spec, value, inside, who, nested=nested)

    def ramp(self, spec: Parameter, points: Sequence[Any], location: Location, who: str) -> None:
        about = f"{who}: {spec.name}"
        if spec.kind != "number":
            self.say(location, f"{about} takes one value ({spec.range}), not a list; lists of numbers are ramps")
            return
        if not points:
            self.say(location, f"{about} is an empty list; a ramp needs at least one number")
        for i, point in enumerate(points):
            if isinstance(point, str) and isinstance(plain_scalar(point), str):
                self.say((*location, i), f"{about} holds {point!r}; a ramp over depth takes numbers only")
            else:
                self.one(spec, point, (*location, i), who)
