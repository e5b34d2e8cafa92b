"""Models of files to text: YAML in its short forms, which loads back to an equal model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from weightsmith.recipe.fields import StageSpec
from weightsmith.recipe.grammar import Grammar

__all__ = ["dumps", "flow", "to_tree"]

_PLAIN = re.compile(r"[A-Za-z0-9_./+\-][A-Za-z0-9_./@+\- ]*(?<! )")
"""Words that mean themselves without quotes in every YAML version, unless they are numbers or special words."""
_SPECIAL = re.compile(r"(?i)y|n|yes|no|on|off|true|false|null|[-+.0-9].*|.*-")


def dumps(model: Grammar) -> str:
    """Write a recipe as YAML in its short forms; `loads` makes an equal recipe of it."""
    return "\n".join(_block(to_tree(model), "")) + "\n"


def to_tree(value: Any) -> Any:
    """A model as plain values in the shortest form; what has its default is left out."""
    if isinstance(value, StageSpec):
        return {value.name: value.parameters} if value.parameters else value.name
    if isinstance(value, Grammar):
        fields = type(value).model_fields
        given = {name: getattr(value, name) for name in fields}
        tree = {
            name: to_tree(one)
            for name, one in given.items()
            if one != fields[name].get_default(call_default_factory=True)
        } | (value.model_extra or {})
        return tree[value.SHORT] if list(tree) == [value.SHORT] else tree
    if isinstance(value, dict):
        return {key: to_tree(one) for key, one in value.items()}
    if isinstance(value, tuple):
        alone = len(value) == 1 and isinstance(value[0], (str, StageSpec))
        return to_tree(value[0]) if alone else [to_tree(one) for one in value]
    return value


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
                inner = _block(item, indent + "    ") if isinstance(item, Mapping) and item else [flow(item)]
                lines += [f"{indent}  - {inner[0].strip()}", *inner[1:]]
        else:
            lines.append(f"{head} {flow(value)}")
    return lines


def _small(value: Any) -> bool:
    """Fits on one line beside its key, and nothing in it deserves a line of its own."""
    return len(flow(value)) <= 60 and not any(word in str(value) for word in ("models", "slices", "modules"))


def flow(value: Any) -> str:
    """A value on one line, as YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
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
