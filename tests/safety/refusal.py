"""What comes of a call on hostile input: its value, or weightsmith's own words.  Any other exception is a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from weightsmith.core.errors import WeightsmithError

T = TypeVar("T")


def outcome(call: Callable[[], T]) -> tuple[T | None, str]:
    """(value, '') or (None, text of the error); the text has no control characters but line ends."""
    try:
        return call(), ""
    except WeightsmithError as error:
        text = str(error)
        assert text
        assert all(c.isprintable() or c == "\n" for c in text)
        return None, text
