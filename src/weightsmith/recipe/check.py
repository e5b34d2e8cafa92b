"""What a recipe says about methods and their parameters, checked against the methods themselves.

Works on plain values with places, so that every problem has a line and all come out together,
however many other things are wrong with the recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.keys import RULE_ROLES
from weightsmith.core.method import Method, Parameter, Pipeline, Stage, registry
from weightsmith.recipe.aliases import expand
from weightsmith.recipe.cases import CASE_KEYS, is_cases
from weightsmith.recipe.reader import Place
from weightsmith.recipe.schema import OUTSIDE, ModelRef, is_composed

__all__ = ["Problem", "check_methods", "spell"]

KEEP = "keep"
"""The one-word treatment of a rule that takes the base's tensor."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where in the recipe."""

    place: Place
    text: str


def spell(place: Place) -> str:
    """('rules', 0, 'parameters') as 'rules[0].parameters'."""
    words = [f"[{p}]" if isinstance(p, int) else f".{p}" for p in place]
    return "".join(words).removeprefix(".") or "the recipe"


@dataclass(frozen=True)
class _Written:
    """One stage as written: its class, if the name is known, and what is set inside it."""

    cls: type[Stage] | None
    name: str
    inline: Mapping[str, Any]
    place: Place  # of the inline parameters

    def parameter(self, name: str) -> Parameter | None:
        specs = self.cls.parameters() if self.cls is not None else ()
        return next((p for p in specs if p.name == name), None)


_Group = Sequence[_Written]


def check_methods(tree: Mapping[str, Any]) -> list[Problem]:
    """Problems with methods and parameters, wherever a recipe may name them: each with its place.

    A parameter outside the stages belongs to the one stage that has it and does not set it inside.
    """
    checker = _Checker(tree)
    checker.run()
    return checker.problems


class _Checker:
    def __init__(self, tree: Mapping[str, Any]) -> None:
        self.tree = tree
        self.problems: list[Problem] = []
        models = tree.get("models")
        self.models: Mapping[str, Any] = models if isinstance(models, Mapping) else {}

    def run(self) -> None:
        tree = self.tree
        main = self.stages(tree["method"], ("method",)) if "method" in tree else []
        if any(s.name == KEEP for s in main):
            self.say(("method",), "method 'keep' takes the base's tensor; it is for rules, not for the whole recipe")
        rules = [r if isinstance(r, Mapping) else {} for r in _list(tree.get("rules"))]
        groups: list[_Group] = [main]
        effective: list[_Group] = []
        for i, rule in enumerate(rules):
            own = self.stages(rule["method"], ("rules", i, "method")) if rule.get("method") is not None else None
            effective.append(main if own is None else own)
            if own is not None:
                groups.append(own)
        for stage in (s for group in groups for s in group):
            self.inline(stage)
        self.outer(tree.get("parameters"), ("parameters",), groups)
        for name, ref in self.models.items():
            if isinstance(ref, Mapping) and not is_composed(ref):
                extra = {k: v for k, v in ref.items() if k not in ModelRef.model_fields}
                self.outer(extra, ("models", name), groups, per_model=True)
        for i, (rule, group) in enumerate(zip(rules, effective, strict=True)):
            self.outer(rule.get("parameters"), ("rules", i, "parameters"), [group], overrides=True)

    def say(self, place: Place, text: str) -> None:
        self.problems.append(Problem(place, text))

    # -- stages

    def stages(self, value: Any, place: Place) -> list[_Written]:
        """Read a method or pipeline; what cannot be read is a problem and a stage without a class."""
        if isinstance(value, (list, tuple)):
            found = [stage for i, v in enumerate(value) for stage in self.stage(v, (*place, i))]
            if not found:
                self.say(place, f"{spell(place)} is an empty list; name a method")
        else:
            found = self.stage(value, place)
        self.one_method(found, place)
        return found

    def stage(self, value: Any, place: Place) -> list[_Written]:
        """One stage as written; several where it names a pipeline."""
        name: Any
        inline: Any = {}
        inside = place
        if isinstance(value, str):
            name = value
        elif isinstance(value, Mapping) and "name" in value:
            name, inline, inside = value["name"], value.get("parameters"), (*place, "parameters")
            for key in value.keys() - {"name", "parameters"}:
                self.say((*place, key), f"unknown key {key!r} in {spell(place)}; known: name, parameters")
        elif isinstance(value, Mapping) and len(value) == 1:
            ((name, inline),) = value.items()
            inside = (*place, name)
        else:
            example = "write one as {ties: {density: 0.3}}, several as a list: [dare, ties]"
            self.say(place, f"{spell(place)} should name one method per stage; {example}")
            return [_Written(None, "", {}, place)]
        if inline is None:
            inline = {}
        if not isinstance(inline, Mapping):
            self.say(inside, f"{spell(inside)} should be a mapping of parameters, is {inline!r}")
            inline = {}
        if not isinstance(name, str):
            self.say(place, f"{spell(place)}: a method's name should be a word, is {name!r}")
            return [_Written(None, "", {}, place)]
        return [_Written(self.look_up(n, place), n, own, inside) for n, own in expand(name, inline)]

    def look_up(self, name: str, place: Place) -> type[Stage] | None:
        try:
            return registry(name)
        except RecipeError as error:
            self.say(place, f"{error}" if place == ("method",) else f"{error} (in {spell(place)})")
            return None

    def one_method(self, stages: _Group, place: Place) -> None:
        """A pipeline of known stages has one method; filters and codecs alone are put around task arithmetic."""
        classes = [s.cls for s in stages if s.cls is not None]
        if len(classes) < len(stages) or not any(issubclass(cls, Method) for cls in classes):
            return
        try:
            _ = Pipeline(tuple(cls() for cls in classes)).method
        except RecipeError as error:
            self.say(place, f"{spell(place)}: {error}")

    # -- parameters

    def inline(self, stage: _Written) -> None:
        if stage.cls is None:
            return
        known = [p.name for p in stage.cls.parameters()]
        for name, value in stage.inline.items():
            spec = stage.parameter(name)
            if spec is None:
                self.unknown(name, stage.place, known, (stage.name,))
            else:
                self.value(spec, value, (*stage.place, name), stage.name)

    def outer(
        self, values: Any, place: Place, groups: Sequence[_Group], *, per_model: bool = False, overrides: bool = False
    ) -> None:
        """Check parameters written outside the stages.  `overrides`: they replace what is written inside."""
        if values is None:
            return
        if not isinstance(values, Mapping):
            self.say(place, f"{spell(place)} should be a mapping of parameters, is {values!r}")
            return
        stages = [s for group in groups for s in group]
        known = {p.name: p for s in stages if s.cls is not None for p in s.cls.parameters()}
        offered = [p.name for p in known.values() if p.each or not per_model]
        if per_model:
            offered += list(ModelRef.model_fields)
        for name, value in values.items():
            here = (*place, name)
            if name not in known:
                # An unknown method may have any parameter, but hardly one that looks like a misspelt other.
                certain = bool(stages) and all(s.cls is not None for s in stages)
                if certain or difflib.get_close_matches(name, offered, n=1, cutoff=0.75):
                    self.unknown(name, place, offered, [s.name for s in stages])
                continue
            takers = self.takers(name, groups, here, overrides=overrides)
            for stage in takers:
                spec = stage.parameter(name)
                assert spec is not None
                if per_model and not spec.each:
                    self.say(
                        here, f"{stage.name} takes one {name} for all models; move it from {spell(place)} to parameters"
                    )
                elif per_model and isinstance(value, Mapping):
                    self.say(here, f"{spell(here)} is for this model alone; it takes a number, not a mapping")
                else:
                    self.value(spec, value, here, stage.name)

    def takers(self, name: str, groups: Sequence[_Group], here: Place, *, overrides: bool) -> list[_Written]:
        """The stages that a value from outside goes to: in each pipeline the one that does not set it inside."""
        found: dict[type[Stage], _Written] = {}
        for group in groups:
            having = [s for s in group if s.parameter(name) is not None]
            rivals = [s for s in having if name not in s.inline]
            if len(rivals) > 1:
                names = " and ".join(dict.fromkeys(s.name for s in rivals))
                self.say(here, f"{name!r} belongs to {names}; write it inside the stage it is meant for, "
                               f"as {{{rivals[0].name}: {{{name}: ...}}}}")  # fmt: skip
                return []
            chosen = rivals or (having if overrides else [])
            found |= {s.cls: s for s in chosen if s.cls is not None}
        if not found:
            owner = next(s.name for group in groups for s in group if s.parameter(name) is not None)
            self.say(
                here, f"{name!r} is set inside the stage {owner!r} and again in {spell(here[:-1])}; keep one of them"
            )
        return list(found.values())

    def unknown(self, name: str, place: Place, known: Sequence[str], stages: Iterable[str]) -> None:
        where = f"unknown key {name!r} in {spell(place)}"
        if not known:
            self.say((*place, name), f"{where}; {', '.join(dict.fromkeys(stages))} takes no parameters")
        else:
            self.say((*place, name), f"{where}{did_you_mean(name, known)}")

    def value(self, spec: Parameter, value: Any, place: Place, method: str, *, nested: bool = False) -> None:
        """One value, a ramp over depth, cases by tensor, or one of these per model."""
        if is_cases(value):
            self.cases(spec, value, place, method, nested=nested)
        elif isinstance(value, Mapping):
            if nested:
                self.say(place, f"{spell(place)} takes a number or a list of numbers, not a mapping")
            elif not spec.each:
                self.say(place, f"{method} takes one {spec.name} for all models, not one per model")
            else:
                for name, inner in value.items():
                    if name not in self.models:
                        self.say(
                            (*place, name), f"unknown model {name!r} in {spell(place)}{did_you_mean(name, self.models)}"
                        )
                    else:
                        self.value(spec, inner, (*place, name), method, nested=True)
        elif isinstance(value, (list, tuple)):
            self.ramp(spec, value, place, method)
        elif text := spec.check(value):
            self.say(place, f"{method}: {text}")

    def cases(self, spec: Parameter, cases: Sequence[Any], place: Place, method: str, *, nested: bool) -> None:
        for i, case in enumerate(cases):
            here = (*place, i)
            if not isinstance(case, Mapping):
                if i + 1 < len(cases):
                    self.say(
                        here, f"{spell(here)} is for every tensor, so that the cases behind it never count; put it last"
                    )
                if case is not None:
                    self.value(spec, case, here, method, nested=nested)
                continue
            for key in case.keys() - set(CASE_KEYS):
                self.say((*here, key), f"unknown key {key!r} in {spell(here)}{did_you_mean(str(key), CASE_KEYS)}")
            if "value" not in case:
                self.say(here, f"{spell(here)} has no value; write {{match: GLOB, value: ...}}")
            elif case["value"] is not None:
                self.value(spec, case["value"], (*here, "value"), method, nested=nested)
            for text in _selector_problems(case):
                self.say(here, f"{spell(here)}: {text}")

    def ramp(self, spec: Parameter, points: Sequence[Any], place: Place, method: str) -> None:
        if spec.kind != "number":
            self.say(
                place, f"{method}: {spec.name} takes one value ({spec.range}), not a list; lists of numbers are ramps"
            )
        elif not points:
            self.say(place, f"{method}: {spec.name} is an empty list; a ramp needs at least one number")
        for i, point in enumerate(points if spec.kind == "number" else ()):
            if isinstance(point, str):
                self.say((*place, i), f"{method}: {spec.name} holds {point!r}; a ramp over depth takes numbers only")
            elif text := spec.check(point):
                self.say((*place, i), f"{method}: {text}")


def _selector_problems(case: Mapping[str, Any]) -> Iterable[str]:
    for key in ("match", "role"):
        words = case.get(key, "*")
        listed = [words] if isinstance(words, str) else words
        if not isinstance(listed, (list, tuple)) or not all(isinstance(w, str) for w in listed):
            yield f"{key} should be a word or a list of words, is {words!r}"
        elif key == "role" and words != "*":
            yield from (f"unknown role {w!r}{did_you_mean(w, RULE_ROLES)}" for w in listed if w not in RULE_ROLES)
    layers = case.get("layers")
    numbers = isinstance(layers, (list, tuple)) and len(layers) == 2 and all(type(n) is int for n in layers)
    if layers is not None and layers != OUTSIDE and not (numbers and 0 <= layers[0] < layers[1]):
        yield f"layers should be two block numbers [start, end] or {OUTSIDE!r}, is {layers!r}"


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
