"""The JSON Schema of recipes, for editors: pydantic's, with the short forms and the parameters of methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from weightsmith.core.method import Parameter, Stage, registered
from weightsmith.recipe.fields import Case
from weightsmith.recipe.schema import ModelRef, Module, Modules, Recipe, Rule, Slices

__all__ = ["definitions", "schema"]


def schema(plugins: bool = True) -> dict[str, Any]:
    """JSON Schema of recipe files, with the parameters of every method; `plugins=False`: of the built-in ones.

    Names that are not built in stay valid (they may come from a plug-in); misspelt parameters of known
    methods and unknown keys do not.
    """
    stages = {
        name: cls
        for name, cls in registered().items()
        if plugins or cls.__module__.startswith(("weightsmith.methods.", "weightsmith.codecs."))
    }
    defs = definitions((Recipe, ModelRef, Slices, Modules, Module, Rule, Case))
    defs["ModelRef"]["properties"]["model"]["anyOf"] = [{"type": "string"}, *_COMPOSED]
    for owner in ("Recipe", "Rule"):
        for name in ("method", "parameters"):
            about = defs[owner]["properties"][name].get("description", "of the method")
            defs[owner]["properties"][name] = _ref(name) | {"description": about}
    defs["ModelRef"]["properties"] |= _parameters(stages, each=True)
    defs |= {
        "parameters": {"type": "object", "properties": _parameters(stages)},
        "method": {"anyOf": [_ref("StageSpec"), {"type": "array", "items": _ref("StageSpec"), "minItems": 1}]},
        "StageSpec": _stage(stages),
        **{f"{n} parameters": _stage_parameters(cls) for n, cls in stages.items()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weightsmith recipe",
        "$ref": "#/$defs/Recipe",
        "$defs": defs,
    }


def definitions(kinds: Iterable[type]) -> dict[str, Any]:
    """What the schema says of some forms of files, by name, with the short forms of what they hold."""
    models = [(kind, "validation") for kind in kinds]
    found: dict[str, Any] = models_json_schema(models, schema_generator=_Untitled)[1]["$defs"]  # type: ignore[arg-type]
    made: dict[str, Any] = _with_short_forms(found)
    return made


class _Untitled(GenerateJsonSchema):
    """Without titles, which repeat the names; of a docstring its first line."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        del made["title"]
        return made | {"description": _summary(schema["cls"])}


def _ref(*path: str) -> dict[str, Any]:
    return {"$ref": "/".join(["#/$defs", *path]).replace(" ", "%20")}


_FILE = {
    "type": "object",
    "properties": {"file": {"type": "string"}, "sha256": {"type": "string"}},
    "required": ["file"],
    "additionalProperties": False,
}
"""A file of coefficients, see `recipe.table`."""

_COMPOSED = [_ref(name) for name in ("Recipe", "Slices", "Modules")]
_SHORT = [_ref("ModelRef"), _ref("Tokenizer")]


def _with_short_forms(made: Any) -> Any:
    """The schema with the short forms of models and of the tokenizer, and without examples, which are parts of YAML."""
    if isinstance(made, list):
        return [_with_short_forms(one) for one in made]
    if not isinstance(made, dict):
        return made
    made = {key: _with_short_forms(one) for key, one in made.items() if key != "examples"}
    ref = {"$ref": made.pop("$ref")} if "$ref" in made else None
    if ref in _SHORT:
        return made | {"anyOf": [{"type": "string"}, ref, *(_COMPOSED if ref == _SHORT[0] else [])]}
    return made | (ref or {})


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


# --- methods and parameters ------------------------------------------------------------------------


def _stage(stages: Mapping[str, type[Stage]]) -> dict[str, Any]:
    """A stage's name, or its name with its parameters."""
    named: dict[str, Any] = {n: {"anyOf": [_ref(f"{n} parameters"), {"type": "null"}]} for n in stages}
    named |= {"name": {"type": "string"}, "parameters": {"type": "object"}}
    whole = {"type": "object", "minProperties": 1, "maxProperties": 2, "properties": named}
    return {"anyOf": [{"enum": list(stages)}, {"type": "string"}, whole]}


def _parameters(stages: Mapping[str, type[Stage]], *, each: bool = False) -> dict[str, Any]:
    """Every parameter of every method; one name may mean different ranges, any of which is valid."""
    owners: dict[str, list[str]] = {}
    for name, cls in stages.items():
        for spec in cls.parameters():
            if spec.each or not each:
                owners.setdefault(spec.name, []).append(f"{name} parameters")
    return {n: {"anyOf": [_ref(owner, "properties", n) for owner in found]} for n, found in sorted(owners.items())}


def _stage_parameters(cls: type[Stage]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": _summary(cls),
        "properties": {p.name: _parameter(p) for p in cls.parameters()},
        "additionalProperties": False,
    }


def _parameter(spec: Parameter) -> dict[str, Any]:
    """One parameter: a value, a ramp over depth, or (where experts may differ) a mapping from model names, or cases."""
    forms = [_value(spec)]
    if spec.kind == "number":
        forms.append({"type": "array", "items": _number(spec), "minItems": 1})
        forms.append(_FILE)
    if spec.each:
        forms.append({"type": "object", "additionalProperties": {"anyOf": list(forms)}})
    forms.append({"type": "array", "items": {"anyOf": [_ref("Case"), *forms, {"type": "null"}]}})
    described: dict[str, Any] = {"description": f"{spec.help}; {spec.range}"}
    if isinstance(spec.default, (bool, int, float, str)):
        described["default"] = spec.default
    return described | {"anyOf": forms}


def _value(spec: Parameter) -> dict[str, Any]:
    if spec.kind in ("flag", "choice"):
        return {"enum": list(spec.options)} if spec.options else {"type": "boolean"}
    number = _number(spec)
    return {"anyOf": [number, {"enum": list(spec.options)}]} if spec.options else number


def _number(spec: Parameter) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer" if spec.kind == "integer" else "number"}
    if spec.low != float("-inf"):
        found["exclusiveMinimum" if spec.low_open else "minimum"] = spec.low
    if spec.high != float("inf"):
        found["exclusiveMaximum" if spec.high_open else "maximum"] = spec.high
    return found
