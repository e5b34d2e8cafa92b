"""Scores of what a model wrote: edits by their rendered error, pictures by their caption's words."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.study.svg.colours import colour
from weightsmith.study.svg.parse import Element, Refused, extract, numbers, parse, path_commands
from weightsmith.study.svg.render import mse, render
from weightsmith.study.svg.scenes import Case

__all__ = ["Edited", "Generated", "edited", "generated", "letter_of"]


@dataclass(frozen=True)
class Edited:
    """mse: of the rasters on [0, 1]; 1 for an answer that cannot be read.  compression: bytes out / in."""

    mse: float
    valid: bool
    unchanged: bool
    compression: float
    unsupported: int


def edited(case: Case, written: str, size: int = 72) -> Edited:
    """Score an answer against the known one."""
    found = extract(written)
    if found is None:
        return Edited(1.0, False, False, 0.0, 0)
    try:
        drawn = render(found, size)
    except Refused:
        return Edited(1.0, False, False, 0.0, 0)
    error = mse(drawn.pixels, render(case.answer, size).pixels)
    same = "".join(found.split()) == "".join(case.svg.split())
    return Edited(error, True, same, len(found.encode()) / len(case.svg.encode()), len(drawn.unsupported))


@dataclass(frozen=True)
class Generated:
    """rules: share of the caption's claims that hold; elements, commands, bytes: what it is made of."""

    valid: bool
    rules: float
    elements: int
    commands: int
    bytes: int


def generated(case: Case, written: str) -> Generated:
    """Score a picture against its caption: of every kind of shape, colour and number."""
    found = extract(written)
    try:
        root = parse(found) if found is not None else None
    except Refused:
        root = None
    if root is None or found is None:
        return Generated(False, 0.0, 0, 0, 0)
    shapes = [(_kind(e), _fill(e)) for e in root.all() if _kind(e)]
    claims = [
        sum(1 for kind, fill in shapes if kind == wanted and fill == colour(shade)) == count
        for shade, wanted, count in case.words
    ]
    commands = sum(len(path_commands(e.attributes.get("d", ""))) for e in root.all())
    return Generated(True, sum(claims) / len(claims), sum(1 for _ in root.all()) - 1, commands, len(found.encode()))


def _kind(element: Element) -> str:
    if element.name == "polygon":
        return "triangle" if len(numbers(element.attributes.get("points", ""))) == 6 else "polygon"
    if element.name == "path":
        letters = "".join(letter.upper() for letter, _ in path_commands(element.attributes.get("d", "")))
        return "triangle" if re.fullmatch(r"M[LHV]{2,3}Z", letters) else "path"
    return element.name if element.name in ("circle", "rect") else ""


def _fill(element: Element) -> object:
    try:
        return colour(element.attributes.get("fill", "black"))
    except ValueError:
        return None


def letter_of(text: str, count: int) -> int | None:
    """The first letter that stands alone and names a choice, as an index; None without one."""
    letters = string.ascii_uppercase[:count]
    found = re.search(rf"(?<![A-Za-z])([{letters}])(?![A-Za-z])", text)
    return letters.index(found[1]) if found else None


def lettered(choices: Sequence[str]) -> str:
    """'A. red\\nB. blue'"""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices, strict=False))
