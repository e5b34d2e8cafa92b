"""YAML or JSON text to plain values, with the position of every one of them.

Read from parser events, not through a YAML constructor: nothing in the text can name a Python
object, duplicate keys and tags are refused, aliases cannot grow without limit, and a number is
what YAML 1.2 and JSON call a number (1e-5 is one; yes, on and 1:30 are words).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from weightsmith.core.errors import RecipeError

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_VALUES",
    "Document",
    "Location",
    "Position",
    "plain_scalar",
    "read",
    "read_all",
    "spell",
]  # fmt: skip

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 100_000
"""Values after aliases are expanded."""

Location = tuple[str | int, ...]
"""Where a value is among the values: ('rules', 0, 'parameters', 'weight')."""

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


def spell(location: Location, root: str = "the recipe") -> str:
    """('rules', 0, 'parameters') as 'rules[0].parameters'; the whole is `root`."""
    words = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location]
    return "".join(words).removeprefix(".") or root


class Position(NamedTuple):
    """Where a value is in a text: file, line and column, from 1; without a line, an option of the command line."""

    where: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.where}:{self.line}:{self.column}" if self.line else self.where

    @classmethod
    def of(cls, where: str, mark: Any) -> Position:
        """The position of one of ruamel's marks, which count from 0."""
        return cls(where, mark.line + 1, mark.column + 1)


@dataclass
class Document:
    """A parsed text: its values, and the position of each."""

    where: str
    tree: Any
    positions: dict[Location, Position] = field(default_factory=dict)

    def at(self, location: Location) -> Position:
        """The position of a value, or of the nearest enclosing one that was written down."""
        while location and location not in self.positions:
            location = location[:-1]
        return self.positions.get(location, Position(self.where))


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
        text = re.sub(_SURROGATES, _join_surrogates, text)
    reader = _Reader(where)
    try:
        return reader.documents(YAML(typ="safe", pure=True).parse(text.removeprefix("\ufeff")))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = Position(where) if mark is None else Position.of(where, mark)
        said = (error.problem or error.context or "").splitlines() or ["unreadable"]
        raise RecipeError(f"{at}: not valid YAML: {said[0]}") from None
    except (YAMLError, ValueError) as error:
        said = str(error).splitlines() or ["unreadable"]
        raise RecipeError(f"{where}: not valid YAML: {said[0]}") from None


_SURROGATES = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"


def _join_surrogates(match: re.Match[str]) -> str:
    """JSON writes one character beyond U+FFFF as two escapes, YAML as one."""
    high, low = int(match[0][2:6], 16), int(match[0][8:], 16)
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


class _Reader:
    """Turns parser events into values; `positions` are those of the document that is being read."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.size = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # name -> value, and how many values are in it
        self.positions: dict[Location, Position] = {}

    def documents(self, events: Iterator[Event]) -> list[Document]:
        found: list[Document] = []
        for event in events:
            if isinstance(event, DocumentStartEvent):
                self.anchors, self.positions = {}, {}
            elif isinstance(event, NodeEvent):
                found.append(Document(self.where, self.value(event, events, ()), self.positions))
        if not found:
            raise RecipeError(f"{self.where}: the text is empty")
        return found

    def at(self, event: Event) -> Position:
        return Position.of(self.where, event.start_mark)

    def refuse(self, event: Event, text: str) -> NoReturn:
        raise RecipeError(f"{self.at(event)}: {text}")

    def text(self, event: ScalarEvent) -> str:
        text: str = event.value
        if any("\ud800" <= c <= "\udfff" for c in text):
            self.refuse(event, f"{text!r} holds half a character (a lone surrogate)")
        return text

    def count(self, event: Event, size: int) -> None:
        self.size += size
        if self.size > MAX_VALUES:
            self.refuse(event, f"more than {MAX_VALUES:,} values (aliases count as often as they are used)")

    def value(self, event: Event, events: Iterator[Event], location: Location) -> Any:
        if len(location) > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} deep")
        self.positions.setdefault(location, self.at(event))  # in a mapping it is the key's
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                self.refuse(
                    event, f"alias *{event.anchor} stands for nothing written before it; put words with a * in quotes"
                )
            value, size = self.anchors[event.anchor]
            self.count(event, size)
            return _copy(value)  # an override must not change both
        if (tag := getattr(event, "tag", None)) is not None:
            self.refuse(event, f"tags are not read: {tag}")
        self.count(event, 1)
        before = self.size
        if isinstance(event, ScalarEvent):
            plain = event.implicit[0] and event.style is None  # an empty plain scalar is null, a quoted one text
            value = plain_scalar(self.text(event)) if plain else self.text(event)
        elif isinstance(event, SequenceStartEvent):
            value = self.sequence(events, location)
        else:
            value = self.mapping(events, location)
        if anchor := getattr(event, "anchor", None):
            self.anchors[anchor] = value, 1 + self.size - before
        return value

    def sequence(self, events: Iterator[Event], location: Location) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            values.append(self.value(event, events, (*location, len(values))))
        return values

    def mapping(self, events: Iterator[Event], location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                self.refuse(event, "a key must be a word")
            if event.tag is not None:
                self.refuse(event, f"tags are not read: {event.tag}")
            name = self.text(event)
            here = (*location, name)
            if name == "<<" and event.style is None:
                self.refuse(event, "merge keys (<<) are not read; write the keys out")
            if name in values:
                self.refuse(event, f"{name!r} is given twice (first in line {self.positions[here].line})")
            self.positions[here] = self.at(event)
            values[name] = self.value(next(events), events, here)
        return values
