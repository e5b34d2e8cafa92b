"""Tables and pages of the layers below."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

from weightsmith.cli.show import table

if TYPE_CHECKING:
    from weightsmith.report.table import Table

__all__ = ["need_plotly", "show_tables"]


def show_tables(tables: Iterable[Table]) -> None:
    for one in tables:
        right = [i for i, number in enumerate(one.numeric()) if number]
        table(one.title, [column.title for column in one.columns], one.cells(), right)


def need_plotly(purpose: str) -> None:
    """Raise MissingExtra where pages cannot be made: better known before the measuring than after it."""
    from weightsmith.core.errors import MissingExtra

    if importlib.util.find_spec("plotly") is None:
        raise MissingExtra("plotly", "report", purpose)
