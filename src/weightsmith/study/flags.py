"""What a reader must know of an expert before its share says anything: one wording for studies and suites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["Flagged", "flags", "in_a_sentence", "marked", "notes"]


class Flagged(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str: ...

    @property
    def flags(self) -> tuple[str, ...]: ...


def flags(lost: Iterable[str]) -> tuple[str, ...]:
    """The flags of an expert for the tasks, or domains, of its own on which the base is better."""
    return tuple(f"worse than the base on {task}" for task in lost)


def marked(row: Flagged, sign: str = "") -> str:
    """Its name, with another sign, and a dagger where there is a note of it."""
    return row.name + sign + (" †" if row.flags else "")


def notes(rows: Iterable[Flagged]) -> list[str]:
    """What stands below a table."""
    return [f"† {row.name}: {', '.join(row.flags)}" for row in rows if row.flags]


def in_a_sentence(rows: Iterable[Flagged]) -> list[str]:
    """What the text says."""
    return [f"{row.name} is {', '.join(row.flags)}: its share there says little" for row in rows if row.flags]
