"""The form of a recipe, from the grammar's JSON Schema and the parameters that the methods declare.

A new field of the grammar, a new method or a new parameter is in the form without a line here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.method import registered, registry
from weightsmith.core.parameter import Parameter
from weightsmith.inspect.catalogue import by_purpose, describe
from weightsmith.recipe.aliases import PIPELINES
from weightsmith.recipe.json_schema import schema
from weightsmith.recipe.reader import Location
from weightsmith.recipe.text import flow

__all__ = ["Field", "Form", "form", "method_groups", "parameters_of", "stages_of", "with_parameter", "with_stages"]

_OWN = ("base", "models", "method", "parameters", "rules")
"""Fields of a recipe that have a part of the form of their own."""


@dataclass(frozen=True)
class Field:
    """One input of the form.

    key      the location in the recipe, as JSON
    kind     text, select, or yaml (a value on one line)
    ramp     the values over depth, where the value is a list of numbers; `low` and `high` the ends of its scale
    """

    key: str
    label: str
    kind: str
    value: str
    help: str = ""
    default: str = ""
    options: tuple[str, ...] = ()
    range: str = ""
    ramp: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 1.0
    rampable: bool = False

    @property
    def id(self) -> str:
        return "f-" + "-".join(str(step) for step in json.loads(self.key))


@dataclass(frozen=True)
class Entry:
    """A model of the recipe, and its own values of parameters."""

    name: str
    path: Field
    own: tuple[Field, ...]


@dataclass(frozen=True)
class Stage:
    """One stage of the method."""

    index: int
    name: str
    summary: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Form:
    base: Field
    models: tuple[Entry, ...]
    stages: tuple[Stage, ...]
    rules: tuple[tuple[int, tuple[Field, ...]], ...]
    settings: tuple[Field, ...]
    needs_base: bool = False
    names: tuple[str, ...] = ()


def form(tree: Mapping[str, Any]) -> Form:
    """The form of a recipe that was parsed, whatever is wrong with it."""
    stages = stages_of(tree)
    refs = tree.get("models")
    models = refs if isinstance(refs, Mapping) else {}
    each = {p.name: p for name, _ in stages for p in parameters_of(name) if p.each}
    return Form(
        base=_place(("base",), "Base model", tree.get("base"), "the model that the others were fine-tuned from"),
        models=tuple(_entry(name, ref, each) for name, ref in models.items()),
        stages=tuple(_stage(tree, i, name, own) for i, (name, own) in enumerate(stages)),
        rules=tuple(_rules(tree)),
        settings=tuple(_settings(tree)),
        needs_base=any("base" in _needs(name) for name, _ in stages),
        names=tuple(map(str, models)),
    )


# --- models ----------------------------------------------------------------------------------------


def _place(key: Location, label: str, ref: Any, help: str = "") -> Field:
    model = ref
    if isinstance(ref, Mapping) and "model" in ref:  # which is changed alone: the values beside it stay
        key, model = (*key, "model"), ref["model"]
    return Field(json.dumps(key), label, "text" if model is None or isinstance(model, str) else "yaml",
                 "" if model is None else _text(model), help)  # fmt: skip


def _entry(name: str, ref: Any, each: Mapping[str, Parameter]) -> Entry:
    own = ref if isinstance(ref, Mapping) and not {"models", "slices", "modules"} & ref.keys() else {}
    location = ("models", name)
    fields = tuple(_parameter((*location, p.name), p, own.get(p.name), "as all") for p in each.values())
    return Entry(name, _place(location, name, ref), fields)


# --- method ----------------------------------------------------------------------------------------


def stages_of(tree: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters written inside) of every stage, as far as they can be made out."""
    method = tree.get("method")
    found: list[tuple[str, dict[str, Any]]] = []
    for one in method if isinstance(method, list) else [method] if method is not None else []:
        if isinstance(one, str):
            found.append((one, {}))
        elif isinstance(one, Mapping) and "name" in one:
            inside = one.get("parameters")
            found.append((str(one["name"]), dict(inside) if isinstance(inside, Mapping) else {}))
        elif isinstance(one, Mapping) and one:
            name, inside = next(iter(one.items()))
            found.append((str(name), dict(inside) if isinstance(inside, Mapping) else {}))
    return found


def with_stages(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """What a recipe has as its method for some stages."""
    told = [{name: dict(own)} if own else name for name, own in stages]
    return told[0] if len(told) == 1 else told


def with_parameter(tree: Mapping[str, Any], index: int, name: str, value: Any) -> tuple[Location, Any]:
    """Where a stage's parameter is written, and what: inside the stage where it stands there, or there are several."""
    stages = stages_of(tree)
    common = tree.get("parameters")
    shared = isinstance(common, Mapping) and name in common
    if shared or (len(stages) == 1 and name not in stages[0][1]):
        return ("parameters", name), value
    own = {**stages[index][1], name: value}
    stages[index] = stages[index][0], {key: one for key, one in own.items() if one is not None}
    return ("method",), with_stages(stages)


def parameters_of(name: str) -> tuple[Parameter, ...]:
    """The parameters of a stage, of a pipeline those of all its stages; none of what nobody knows."""
    found: dict[str, Parameter] = {}
    for one in _inside(name):
        try:
            found |= {p.name: p for p in reversed(registry(one).parameters())}
        except RecipeError:
            return ()
    return tuple(reversed(found.values()))


def _inside(name: str) -> list[str]:
    """The stages that a name stands for: those of a pipeline, or itself."""
    return [stage for stage, _ in PIPELINES[name]] if name in PIPELINES else [name]


def _needs(name: str) -> tuple[str, ...]:
    try:
        return tuple(need for one in _inside(name) for need in registry(one).traits.needs)
    except RecipeError:
        return ()


def _stage(tree: Mapping[str, Any], index: int, name: str, own: Mapping[str, Any]) -> Stage:
    common = tree.get("parameters")
    given = {**(common if isinstance(common, Mapping) else {}), **own}
    fields = [_parameter(("stage", index, p.name), p, given.get(p.name)) for p in parameters_of(name)]
    return Stage(index, name, summaries().get(name, ""), tuple(fields))


def _parameter(key: Location, spec: Parameter, value: Any, default: str = "") -> Field:
    ramp = tuple(map(float, value)) if _numbers(value) else ()
    low, high = _scale(spec, ramp)
    options = ("true", "false") if spec.kind == "flag" else spec.options if spec.kind == "choice" else ()
    return Field(
        json.dumps(key), spec.name, "select" if options else "yaml", "" if value is None else _text(value), spec.help,
        default or ("" if spec.default is None else _text(_first(spec.default))), options, spec.range, ramp, low, high,
        spec.kind == "number",
    )  # fmt: skip


def _first(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _numbers(value: Any) -> bool:
    good = isinstance(value, list) and 0 < len(value) <= 500
    return good and all(type(v) in (int, float) and math.isfinite(v) for v in value)


def _scale(spec: Parameter, values: Sequence[float]) -> tuple[float, float]:
    """The ends of the scale that a ramp is drawn on: the range where it is finite, else what holds the values."""
    low = spec.low if math.isfinite(spec.low) else min(0.0, *values) if values else 0.0
    high = spec.high if math.isfinite(spec.high) else max(1.0, *(2 * v for v in values)) if values else 1.0
    return low, high if high > low else low + 1.0


# --- everything else, from the schema ---------------------------------------------------------------


@cache
def _schema() -> Mapping[str, Any]:
    return schema()["$defs"]  # type: ignore[no-any-return]


def _settings(tree: Mapping[str, Any]) -> Iterator[Field]:
    for name, said in _schema()["Recipe"]["properties"].items():
        if name in _OWN:
            continue
        inner = _object(said)
        if inner is None:
            yield _of_schema((name,), said, tree.get(name))
            continue
        given = tree.get(name)
        for part, one in inner.items():
            value = given.get(part) if isinstance(given, Mapping) else None
            yield _of_schema((name, part), one, value)


def _object(said: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The properties of what is nothing but a mapping with known keys."""
    target = said.get("$ref", "").rpartition("/")[2]
    return _schema()[target].get("properties") if target in _schema() and "anyOf" not in said else None


def _rules(tree: Mapping[str, Any]) -> Iterator[tuple[int, tuple[Field, ...]]]:
    rules = tree.get("rules")
    said = _schema()["Rule"]["properties"]
    for i, rule in enumerate(rules if isinstance(rules, list) else ()):
        if isinstance(rule, Mapping):
            yield i, tuple(_of_schema(("rules", i, name), one, rule.get(name)) for name, one in said.items())


def _of_schema(key: Location, said: Mapping[str, Any], value: Any) -> Field:
    forms = [said, *said.get("anyOf", ())]
    options = next((tuple(map(_text, one["enum"])) for one in forms if "enum" in one), ())
    boolean = any(one.get("type") == "boolean" for one in forms)
    only_text = all(one.get("type") in ("string", "null") for one in said.get("anyOf", [said]))
    kind = "select" if boolean or (options and len(forms) <= 3) else "text" if only_text and not options else "yaml"
    default = said.get("default")
    return Field(
        json.dumps(key), " ".join(map(str, key)).replace("_", " ") if key[0] != "rules" else str(key[-1]), kind,
        "" if value is None else value if isinstance(value, str) and kind == "text" else _text(value),
        str(said.get("description", "")), "" if default in (None, {}, [], ()) else _text(default),
        ("true", "false") if boolean else options,
    )  # fmt: skip


def _text(value: Any) -> str:
    """A value as it is typed: a text without the quotes that it needs beside other things."""
    return value if isinstance(value, str) else flow(value)


# --- the methods ------------------------------------------------------------------------------------


@cache
def summaries() -> Mapping[str, str]:
    told = {name: str(describe(cls)["summary"]) for name, cls in registered().items()}
    return told | {name: "A pipeline: " + ", then ".join(_inside(name)) for name in PIPELINES}


@cache
def method_groups() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Purpose -> names, for a menu; codecs, which are for `compress`, are left out."""
    every = [describe(cls) for cls in registered().values()]
    chosen = by_purpose([one for one in every if one["kind"] != "codec"])
    groups = [(purpose, tuple(str(one["name"]) for one in members)) for purpose, members in chosen.items()]
    return (*groups, ("Pipelines", tuple(PIPELINES)))
