"""Inspections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.cli.show import say
from weightsmith.cli.shown.tables import show_tables

if TYPE_CHECKING:
    from weightsmith.inspect.run import Inspection

__all__ = ["check_page", "show"]


def check_page(path: Path) -> None:
    from weightsmith.core.errors import OutputError

    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"--html {path}: not a file in an existing folder; make the folder {path.parent} or name one")


def show(found: Inspection) -> None:
    from weightsmith.inspect.show import advice_lines, summary, tables

    show_tables(tables(found))
    for line in summary(found):
        say(line)
    say("\nWhat the figures speak for:")
    for line in advice_lines(found) or ["no rule holds"]:
        say(f"  - {line}")
