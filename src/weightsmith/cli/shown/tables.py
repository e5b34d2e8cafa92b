"""Tables and pages of the layers below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from weightsmith.cli.show import table

if TYPE_CHECKING:
    from weightsmith.report.table import Table

__all__ = ["show_tables"]


def show_tables(tables: Iterable[Table]) -> None:
    for one in tables:
        right = [i for i, number in enumerate(one.numeric()) if number]
        table(one.title, [column.title for column in one.columns], one.cells(), right)
