"""YAML or JSON text to plain values, with the line of every one of them.

Read from parser events, not through a YAML constructor: nothing in the text can name a Python
object, duplicate keys and tags are refused, aliases cannot grow without limit, and a number is
what YAML 1.2 and JSON call a number (1e-5 is one; yes, on and 1:30 are words).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from weightsmith.core.errors import RecipeError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "Document", "Place", "plain_scalar", "read", "read_all"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 100_000
"""Values after aliases are expanded."""

Place = tuple[str | int, ...]
"""Where a value is: ('rules', 0, 'parameters', 'weight')."""

_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def plain_scalar(text: str) -> Any:
    """What an unquoted word means: null, true or false, a number, or the word itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


@dataclass
class Document:
    """A parsed text: the values, and for each place the words an error message starts with ('recipe.yaml:7')."""

    where: str
    tree: Any
    lines: dict[Place, str] = field(default_factory=dict)

    def at(self, place: Place) -> str:
        """'recipe.yaml:7' for a place, or for the nearest enclosing one that was written down."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, self.where)


def read(text: str, where: str) -> Document:
    """Parse the one document of a text; see `read_all`."""
    first, *others = read_all(text, where)
    if others:
        raise RecipeError(f"{others[0].at(())}: a second document begins here; a recipe is one")
    return first


def read_all(text: str, where: str) -> list[Document]:
    """Parse the YAML or JSON documents of a text, at least one; `where` is what messages call it.

    Raises RecipeError for bad syntax, duplicate keys, tags, and sizes over the limits.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{where}: the text is {len(text):,} characters long; at most {MAX_BYTES:,} are read")
    # JSON allows tabs as indentation, YAML does not; inside a JSON or quoted string a line cannot start with one.
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        text = re.sub(r"^[ \t]+", lambda m: m[0].replace("\t", " "), text, flags=re.MULTILINE)
        text = _SURROGATES.sub(_join_surrogates, text)
    reader = _Reader(where)
    try:
        return reader.documents(YAML(typ="safe", pure=True).parse(text.removeprefix("\ufeff")))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        said = (error.problem or error.context or "").splitlines() or ["unreadable"]
        raise RecipeError(f"{where}{line}: not valid YAML: {said[0]}") from None
    except (YAMLError, ValueError) as error:
        said = str(error).splitlines() or ["unreadable"]
        raise RecipeError(f"{where}: not valid YAML: {said[0]}") from None


_SURROGATES = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def _join_surrogates(match: re.Match[str]) -> str:
    """JSON writes one character beyond U+FFFF as two escapes, YAML as one."""
    high, low = int(match[0][2:6], 16), int(match[0][8:], 16)
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


@dataclass(frozen=True)
class _Value:
    """A value with the number of values in it and the lines of what is inside, by place relative to it."""

    value: Any
    size: int
    lines: dict[Place, int]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


class _Reader:
    def __init__(self, where: str) -> None:
        self.where = where
        self.size = 0
        self.anchors: dict[str, _Value] = {}

    def documents(self, events: Iterator[Event]) -> list[Document]:
        found: list[_Value] = []
        for event in events:
            if isinstance(event, DocumentStartEvent):
                self.anchors = {}
            elif isinstance(event, NodeEvent):
                found.append(self.value(event, events, 0))
        if not found:
            raise RecipeError(f"{self.where}: the text is empty")
        return [
            Document(self.where, one.value, {p: f"{self.where}:{n}" for p, n in one.lines.items()}) for one in found
        ]

    def refuse(self, event: Event, text: str) -> NoReturn:
        raise RecipeError(f"{self.where}:{event.start_mark.line + 1}: {text}")

    def text(self, event: ScalarEvent) -> str:
        text: str = event.value
        if any("\ud800" <= c <= "\udfff" for c in text):
            self.refuse(event, f"{text!r} holds half a character (a lone surrogate)")
        return text

    def count(self, event: Event, size: int) -> None:
        self.size += size
        if self.size > MAX_VALUES:
            self.refuse(event, f"more than {MAX_VALUES:,} values (aliases count as often as they are used)")

    def value(self, event: Event, events: Iterator[Event], depth: int) -> _Value:
        if depth > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, AliasEvent):
            known = self.anchors.get(str(event.anchor))
            if known is None:
                self.refuse(
                    event, f"alias *{event.anchor} stands for nothing written before it; put words with a * in quotes"
                )
            self.count(event, known.size)
            return _Value(_copy(known.value), known.size, known.lines)  # an override must not change both
        if (tag := getattr(event, "tag", None)) is not None:
            self.refuse(event, f"tags are not read: {tag}")
        self.count(event, 1)
        before = self.size
        if isinstance(event, ScalarEvent):
            # An empty plain scalar is null; a quoted one is text.
            plain = event.implicit[0] and event.style is None
            text = self.text(event)
            found = _Value(plain_scalar(text) if plain else text, 1, {(): event.start_mark.line + 1})
        elif isinstance(event, SequenceStartEvent):
            found = self.sequence(event, events, depth)
        else:
            found = self.mapping(event, events, depth)
        found = _Value(found.value, 1 + self.size - before, found.lines)
        if anchor := getattr(event, "anchor", None):
            self.anchors[str(anchor)] = found
        return found

    def sequence(self, start: Event, events: Iterator[Event], depth: int) -> _Value:
        values: list[Any] = []
        lines: dict[Place, int] = {(): start.start_mark.line + 1}
        while not isinstance(event := next(events), SequenceEndEvent):
            item = self.value(event, events, depth + 1)
            lines |= {(len(values), *place): line for place, line in item.lines.items()}
            values.append(item.value)
        return _Value(values, 0, lines)

    def mapping(self, start: Event, events: Iterator[Event], depth: int) -> _Value:
        assert isinstance(start, MappingStartEvent)
        values: dict[str, Any] = {}
        lines: dict[Place, int] = {(): start.start_mark.line + 1}
        while not isinstance(event := next(events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                self.refuse(event, "a key must be a word")
            if event.tag is not None:
                self.refuse(event, f"tags are not read: {event.tag}")
            name, line = self.text(event), event.start_mark.line + 1
            if name == "<<" and event.style is None:
                self.refuse(event, "merge keys (<<) are not read; write the keys out")
            if name in values:
                self.refuse(event, f"{name!r} is given twice (first in line {lines[(name,)]})")
            item = self.value(next(events), events, depth + 1)
            lines |= {(name, *place): n for place, n in item.lines.items()}
            lines[(name,)] = line
            values[name] = item.value
        return _Value(values, 0, lines)
