"""Studies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from weightsmith.cli.show import say
from weightsmith.cli.shown.tables import show_tables

if TYPE_CHECKING:
    from weightsmith.study.bench import Result

__all__ = ["show"]


def show(results: Iterable[Result]) -> None:
    from weightsmith.study.show import in_words, tables

    for result in results:
        say()
        show_tables(tables(result))
        for line in in_words(result):
            say(f"- {line}")
        say()
