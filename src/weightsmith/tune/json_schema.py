"""The JSON Schema of TUNE.yaml, for editors: that of recipes, and around it what is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from weightsmith.recipe.json_schema import definitions
from weightsmith.recipe.json_schema import schema as recipe_schema
from weightsmith.tune.objective import Objective
from weightsmith.tune.registry import Named, named
from weightsmith.tune.schema import FreeNumbers, Steps, TaskData, TuneFile
from weightsmith.tune.setting import Preset

__all__ = ["schema"]

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema() -> dict[str, Any]:
    """JSON Schema of tunings.  Names that are not built in stay valid; misspelt options of known ones do not."""
    made = recipe_schema()
    own = definitions((TuneFile, TaskData, FreeNumbers, Steps))
    fields = own["TuneFile"]["properties"]
    fields["recipe"] = _about(fields["recipe"], {"type": "string"}, {"$ref": "#/$defs/Recipe"})
    fields["preset"] = _about(fields["preset"], *_chosen(named(Preset)))
    fields["objective"] = _about(fields["objective"], *_chosen(named(Objective)))
    for name, short, full in (("data", {"type": "string"}, "TaskData"),
                              ("free", own["FreeNumbers"]["properties"]["per"], "FreeNumbers")):  # fmt: skip
        each = {"anyOf": [short, {"$ref": f"#/$defs/{full}"}]}
        fields[name] = {"description": fields[name]["description"], "type": "object", "additionalProperties": each}
    return made | {"title": "weightsmith tuning", "$ref": "#/$defs/TuneFile", "$defs": {**own, **made["$defs"]}}


def _about(field: Mapping[str, Any], *forms: Any) -> dict[str, Any]:
    return {"description": field["description"], "anyOf": list(forms)}


def _chosen(known: Mapping[str, type[Named]]) -> list[Any]:
    """A name, or a name with its options."""
    options = {name: {"anyOf": [_options(cls), {"type": "null"}]} for name, cls in known.items()}
    return [{"enum": list(known)}, {"type": "string"}, {"type": "object", "maxProperties": 1, "properties": options}]


def _options(cls: type[Named]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {
        "type": "object",
        "description": cls.help(),
        "properties": {field.name: _option(hints[field.name], field) for field in dataclasses.fields(cls)},
        "additionalProperties": False,
    }


def _option(kind: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    if kind not in _TYPES:
        return {"type": "array"} if "tuple" in str(kind) else {"type": "object"}
    return {"type": _TYPES[kind], "default": field.default}
