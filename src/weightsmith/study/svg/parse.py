"""SVG text to shapes.  What a model wrote is hostile until proved: no entity, no reference outside, bounded sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from xml.parsers import expat

from weightsmith.core.errors import WeightsmithError

__all__ = ["Element", "Path", "Refused", "extract", "numbers", "parse", "path_commands"]

MAX_BYTES, MAX_ELEMENTS, MAX_DEPTH, MAX_COMMANDS = 1 << 20, 20_000, 64, 20_000


class Refused(WeightsmithError):
    """The text is no SVG that is read here."""


@dataclass
class Element:
    """One element: its name without namespace, its attributes (`style` taken apart), its children."""

    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)

    def all(self) -> Iterator[Element]:
        """This element and those inside, in document order."""
        yield self
        for child in self.children:
            yield from child.all()


Path = list[tuple[str, list[float]]]

_FENCE = re.compile(r"```(?:svg|xml)[^\S\n]*+\n(.*?)```", re.DOTALL | re.IGNORECASE)
_BARE = re.compile(r"<svg\b.*?</svg\s*>", re.DOTALL | re.IGNORECASE)
_UNSAFE = frozenset({"script", "foreignObject", "iframe", "object", "embed", "audio", "video", "handler", "listener"})


def extract(text: str) -> str | None:
    """The first block fenced as svg or xml, else the first <svg>...</svg>; None without either."""
    text = text[: 4 * MAX_BYTES]
    if (found := _FENCE.search(text)) is not None:
        return found[1].strip()
    start = re.search(r"<svg\b", text, re.IGNORECASE)
    if start is None or (found := _BARE.match(text, start.start())) is None:
        return None
    return found[0]


def parse(text: str) -> Element:
    """The root element.

    Raises Refused for a text over 1 MB, broken XML, any document type or entity of its own, scripts, references to what
    lies outside, more than 20,000 elements or path commands, more than 64 levels, or a root that is no <svg>.
    """
    if len(text) > MAX_BYTES or len(data := text.encode(errors="replace")) > MAX_BYTES:
        raise Refused(f"larger than {MAX_BYTES >> 20} MB")
    reader = expat.ParserCreate(namespace_separator=" ")
    builder = _Builder()
    reader.StartElementHandler, reader.EndElementHandler = builder.start, builder.end
    reader.StartDoctypeDeclHandler = reader.EntityDeclHandler = builder.declared
    reader.ProcessingInstructionHandler = builder.instructed
    try:
        reader.Parse(data, True)
    except expat.ExpatError as error:
        raise Refused(f"broken XML: {error}") from None
    root = builder.root
    if root is None or root.name != "svg":
        raise Refused("the root is no <svg>")
    if sum(len(path_commands(e.attributes["d"])) for e in root.all() if "d" in e.attributes) > MAX_COMMANDS:
        raise Refused(f"more than {MAX_COMMANDS} path commands")
    return root


class _Builder:
    """Takes expat's events; whatever it refuses ends the parsing at once."""

    def __init__(self) -> None:
        self.root: Element | None = None
        self.open: list[Element] = []
        self.count = 0

    def declared(self, *told: object) -> None:
        raise Refused("has a document type or entities of its own")

    def instructed(self, target: str, data: str) -> None:
        if target.lower() != "xml":
            raise Refused(f"has a processing instruction {target!r}")

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self.count += 1
        if self.count > MAX_ELEMENTS or len(self.open) >= MAX_DEPTH:
            raise Refused(f"more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels")
        local = name.rpartition(" ")[2]
        if local in _UNSAFE:
            raise Refused(f"<{local}> is not read")
        element = Element(local, _checked(attributes))
        if self.open:
            self.open[-1].children.append(element)
        else:
            self.root = element
        self.open.append(element)

    def end(self, name: str) -> None:
        self.open.pop()


def _checked(attributes: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for full, value in attributes.items():
        name = full.rpartition(" ")[2]
        if name.lower().startswith("on"):
            raise Refused(f"has a handler {name!r}")
        if name in ("href", "src", "base") and not value.strip().startswith("#"):
            raise Refused("refers to something outside")
        if re.search(r"url\(\s*+['\"]?(?!['\"]?#)|@import|javascript:", value, re.IGNORECASE):
            raise Refused("refers to something outside")
        found[name] = value
    for part in found.pop("style", "").split(";"):
        key, colon, value = part.partition(":")
        if colon:
            found[key.strip()] = value.strip()
    return found


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def numbers(text: str) -> list[float]:
    """The finite numbers of an attribute."""
    return [value for one in _NUMBER.findall(text) if math.isfinite(value := float(one))]


_COMMAND = re.compile(r"([MmLlHhVvCcSsQqTtAaZz])([^MmLlHhVvCcSsQqTtAaZz]*)")
_NEXT = re.compile(r"[\s,]*(" + _NUMBER.pattern + ")")
_FLAG = re.compile(r"[\s,]*([01])")
_ARITY = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}


def path_commands(text: str) -> Path:
    """Commands with their numbers, repeated ones apart: 'M0 0 1 1' is M, L.  What does not fit ends the path."""
    made: Path = []
    for letter, rest in _COMMAND.findall(text):
        arity = _ARITY[letter.upper()]
        given = _arc_numbers(rest) if letter in "Aa" else numbers(rest)
        if not arity:
            made.append((letter, []))
            continue
        for at in range(0, len(given) - arity + 1, arity):
            again = {"M": "L", "m": "l"}.get(letter, letter) if at else letter
            made.append((again, given[at : at + arity]))
        if len(given) < arity or len(given) % arity:
            break
    return made


def _arc_numbers(text: str) -> list[float]:
    """Arcs may write their flags without a space: 'a1 1 0 01 2 3'."""
    found: list[float] = []
    at = 0
    while at < len(text):
        match = (_FLAG if len(found) % 7 in (3, 4) else _NEXT).match(text, at)
        if match is None:
            break
        found.append(float(match[1]))
        at = match.end()
    return found
