"""Recipes to text: YAML that loads back to an equal recipe, and the JSON Schema that editors complete from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from weightsmith.core.keys import DTYPES, RULE_ROLES
from weightsmith.core.method import Filter, Method, Parameter, Stage, registered
from weightsmith.recipe.schema import (
    OUTSIDE,
    ModelRef,
    Module,
    Modules,
    Output,
    Recipe,
    Rule,
    Slices,
    StageSpec,
    Tokenizer,
)

__all__ = ["dumps", "schema", "to_tree"]

_PLAIN = re.compile(r"[A-Za-z0-9_./+\-][A-Za-z0-9_./@+\- ]*(?<! )")
"""Words that mean themselves without quotes in every YAML version, unless they are numbers or special words."""
_SPECIAL = re.compile(r"(?i)y|n|yes|no|on|off|true|false|null|[-+.0-9].*|.*-")


def dumps(recipe: Recipe) -> str:
    """Write a recipe as YAML in its short forms; `loads` makes an equal recipe of it."""
    return "\n".join(_block(to_tree(recipe), "")) + "\n"


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values in the shortest form; what has its default is left out."""
    tree: dict[str, Any] = {}
    if recipe.base is not None:
        tree["base"] = _reference(recipe.base)
    tree["models"] = {name: _reference(ref) for name, ref in recipe.models.items()}
    tree["method"] = _method(recipe.method)
    if recipe.parameters:
        tree["parameters"] = dict(recipe.parameters)
    if recipe.rules:
        tree["rules"] = [_rule(rule) for rule in recipe.rules]
    if recipe.exclude:
        tree["exclude"] = _one_or_list(recipe.exclude)
    if recipe.tokenizer is not None:
        tree["tokenizer"] = _tokenizer(recipe.tokenizer)
    return tree | _changed(recipe, ("chat_template", "seed", "extra", "nonfinite")) | _output(recipe.output)


def _tokenizer(tokenizer: Tokenizer) -> Any:
    rest = _changed(tokenizer, ("pad_to_multiple_of",))
    if tokenizer.tokens:
        rest = {"tokens": dict(tokenizer.tokens), **rest}
    return {"source": tokenizer.source, **rest} if rest else tokenizer.source


def _changed(value: Recipe | Rule | Output | ModelRef | Tokenizer, names: tuple[str, ...]) -> dict[str, Any]:
    fields = type(value).model_fields
    found = {n: getattr(value, n) for n in names if getattr(value, n) != fields[n].default}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


def _output(output: Output) -> dict[str, Any]:
    changed = _changed(output, ("dtype", "shard_size"))
    return {"output": changed} if changed else {}


def _reference(ref: ModelRef) -> Any:
    model = _model(ref.model)
    rest = _changed(ref, ("adapter", "layers", "stack", "expert"))
    if ref.stats:
        rest = {"stats": _one_or_list(ref.stats), **rest}
    rest |= ref.parameters
    return {"model": model, **rest} if rest else model


def _model(model: str | Recipe | Slices | Modules) -> Any:
    match model:
        case str():
            return model
        case Recipe():
            return to_tree(model)
        case Slices():
            return {"slices": [_reference(part) for part in model.slices]}
    return {"modules": {name: _module(module) for name, module in model.modules.items()}}


def _module(module: Module) -> dict[str, Any]:
    match = {} if module.match == ("*",) else {"match": _one_or_list(module.match)}
    return {**match, "model": _reference(module.model)}


def _method(stages: tuple[StageSpec, ...]) -> Any:
    return _one_or_list(tuple({s.name: dict(s.parameters)} if s.parameters else s.name for s in stages))


def _rule(rule: Rule) -> dict[str, Any]:
    tree: dict[str, Any] = {"match": _one_or_list(rule.match)}
    if rule.role is not None:
        tree["role"] = _one_or_list(rule.role)
    tree |= _changed(rule, ("layers",))
    if rule.method is not None:
        tree["method"] = _method(rule.method)
    if rule.parameters:
        tree["parameters"] = dict(rule.parameters)
    return tree


def _one_or_list(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else list(values)


# --- YAML ------------------------------------------------------------------------------------------


def _block(tree: Mapping[str, Any], indent: str) -> list[str]:
    """Lines of a mapping: nested mappings below their key, small things on its line."""
    lines = []
    for key, value in tree.items():
        head = f"{indent}{_scalar(str(key))}:"
        if isinstance(value, Mapping) and value and not _small(value):
            lines += [head, *_block(value, indent + "  ")]
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value) and not _small(value):
            lines.append(head)
            for item in value:
                inner = _block(item, indent + "    ") if isinstance(item, Mapping) and item else [_flow(item)]
                lines += [f"{indent}  - {inner[0].strip()}", *inner[1:]]
        else:
            lines.append(f"{head} {_flow(value)}")
    return lines


def _small(value: Any) -> bool:
    """Fits on one line beside its key, and nothing in it deserves a line of its own."""
    return len(_flow(value)) <= 60 and not any(word in str(value) for word in ("models", "slices", "modules"))


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(k))}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        if text in ("inf", "-inf", "nan"):
            return text.replace("inf", ".inf").replace("nan", ".nan")
        return text.replace("e", ".0e") if "e" in text and "." not in text else text  # 1e-05 is a word in YAML 1.1
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and not _SPECIAL.fullmatch(text):
        return text
    return json.dumps(text) if all(c <= "\uffff" for c in text) else _escaped(text)


def _escaped(text: str) -> str:
    """Quoted, with characters beyond U+FFFF as one YAML escape where JSON would write two."""
    return '"' + "".join(f"\\U{ord(c):08x}" if c > "\uffff" else json.dumps(c)[1:-1] for c in text) + '"'


# --- JSON Schema -----------------------------------------------------------------------------------


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
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weightsmith recipe",
        "$ref": "#/$defs/recipe",
        "$defs": {
            "recipe": _object(Recipe, {
                "base": _ref("model"),
                "models": {"type": "object", "minProperties": 1, "additionalProperties": _ref("model")},
                "method": _ref("method"),
                "parameters": _ref("parameters"),
                "rules": {"type": "array", "items": _ref("rule")},
                "exclude": _ref("words"),
                "tokenizer": {"anyOf": [{"type": "string"}, _ref("tokenizer")]},
                "chat_template": {"type": "string"},
                "output": _ref("output"),
                "seed": {"type": "integer"},
                "extra": {"enum": ["refuse", "first"]},
                "nonfinite": {"enum": ["refuse", "allow"]},
            }),
            "model": {"anyOf": [{"type": "string"}, _ref("model_entry"), *_COMPOSED]},
            "model_entry": _object(ModelRef, {
                "model": {"anyOf": [{"type": "string"}, *_COMPOSED]},
                "adapter": {"type": "string"},
                "stats": _ref("words"),
                "layers": _ref("layers"),
                "stack": {"type": "string"},
                "expert": {"type": "string"},
            }, _own_parameters(stages)),
            "slices": _object(Slices, {"slices": {"type": "array", "items": _ref("model"), "minItems": 1}}),
            "modules": _object(Modules, {
                "modules": {"type": "object", "minProperties": 1, "additionalProperties": _ref("module")},
            }),
            "module": _object(Module, {"match": _ref("words"), "model": _ref("model")}),
            "tokenizer": _object(Tokenizer, {
                "source": {"type": "string"},
                "tokens": {"type": "object"},
                "pad_to_multiple_of": {"type": "integer", "minimum": 1},
            }),
            "rule": _object(Rule, {
                "match": _ref("words"),
                "role": _roles(),
                "layers": {"anyOf": [_ref("layers"), {"enum": [OUTSIDE]}]},
                "method": _ref("method"),
                "parameters": _ref("parameters"),
            }),
            "case": {
                "type": "object",
                "description": "A value for some tensors; in a list of cases the first that matches counts.",
                "properties": {
                    "match": _ref("words"),
                    "role": _roles(),
                    "layers": {"anyOf": [_ref("layers"), {"enum": [OUTSIDE]}]},
                    "value": {},
                },
                "required": ["value"],
                "additionalProperties": False,
            },
            "output": _object(Output, {
                "dtype": {"enum": [d.name for d in DTYPES.values() if d.floating]},
                "shard_size": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]},
            }),
            "words": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "layers": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
            "method": {"anyOf": [_ref("stage"), {"type": "array", "items": _ref("stage"), "minItems": 1}]},
            "stage": {"anyOf": [
                {"enum": list(stages)},
                {"type": "string"},
                {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 2,
                    "properties": {
                        **{n: {"anyOf": [_ref(f"{n} parameters"), {"type": "null"}]} for n in stages},
                        "name": {"type": "string"},
                        "parameters": {"type": "object"},
                    },
                },
            ]},
            "parameters": {"type": "object", "properties": _all_parameters(stages)},
            **{f"{n} parameters": _stage_object(cls) for n, cls in stages.items()},
        },
    }  # fmt: skip


def _roles() -> dict[str, Any]:
    return {"anyOf": [{"enum": list(RULE_ROLES)}, {"type": "array", "items": {"enum": list(RULE_ROLES)}}]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name.replace(' ', '%20')}"}


_COMPOSED = (_ref("recipe"), _ref("slices"), _ref("modules"))


def _object(
    model: type[Recipe | ModelRef | Slices | Modules | Module | Rule | Output | Tokenizer],
    properties: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A schema with the model's own descriptions; the fields must be the model's, all of them."""
    described: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        described[name] = (
            {"description": field.description, **properties[name]} if field.description else properties[name]
        )
    required = [n for n, f in model.model_fields.items() if f.is_required()]
    return {
        "type": "object",
        "description": _summary(model),
        "properties": described | (extra or {}),
        **({"required": required} if required else {}),
        "additionalProperties": extra is not None,
    }


def _stage_object(cls: type[Stage]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": _summary(cls),
        "properties": {p.name: _parameter(p) for p in cls.parameters()},
        "additionalProperties": False,
    }


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _parameter(spec: Parameter, *, per_model: bool = True) -> dict[str, Any]:
    """One parameter: a value, a ramp over depth, or (where experts may differ) a mapping from model names."""
    one = _value(spec)
    forms = [one]
    if spec.kind == "number":
        forms.append(
            {"type": "array", "items": {k: v for k, v in one.items() if k != "anyOf"} | _number(spec), "minItems": 1}
        )
    if spec.each and per_model:
        forms.append({"type": "object", "additionalProperties": {"anyOf": list(forms)}})
    forms.append({"type": "array", "items": {"anyOf": [_ref("case"), *forms, {"type": "null"}]}})
    described: dict[str, Any] = {"description": f"{spec.help}; {spec.range}"}
    if isinstance(spec.default, (bool, int, float, str)):
        described["default"] = spec.default
    return described | {"anyOf": forms}


def _value(spec: Parameter) -> dict[str, Any]:
    if spec.kind == "flag":
        return {"type": "boolean"}
    if spec.kind == "choice":
        return {"enum": list(spec.options)}
    number = _number(spec)
    return {"anyOf": [number, {"enum": list(spec.options)}]} if spec.options else number


def _number(spec: Parameter) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer" if spec.kind == "integer" else "number"}
    if spec.low != float("-inf"):
        found["exclusiveMinimum" if spec.low_open else "minimum"] = spec.low
    if spec.high != float("inf"):
        found["exclusiveMaximum" if spec.high_open else "maximum"] = spec.high
    return found


def _all_parameters(stages: Mapping[str, type[Stage]]) -> dict[str, Any]:
    """Every parameter of every method; one name may mean different ranges, any of which is valid."""
    return _joined({n: cls for n, cls in stages.items() if issubclass(cls, (Filter, Method))}, per_model=True)


def _own_parameters(stages: Mapping[str, type[Stage]]) -> dict[str, Any]:
    return _joined(stages, per_model=False)


def _joined(stages: Mapping[str, type[Stage]], *, per_model: bool) -> dict[str, Any]:
    forms: dict[str, list[dict[str, Any]]] = {}
    for name, cls in stages.items():
        for spec in cls.parameters():
            if spec.each or per_model:
                form = _parameter(spec, per_model=per_model)
                form["description"] = f"{name}: {form['description']}"
                forms.setdefault(spec.name, []).append(form)
    return {n: f[0] if len(f) == 1 else {"anyOf": f} for n, f in sorted(forms.items())}
