"""Long tables, a page at a time: filtered and sorted here, so that ten thousand rows stay quick in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.report.units import size
from weightsmith.studio.asked import Asked
from weightsmith.studio.render import address

__all__ = ["Table"]

_SIZE = 100


class Table:
    """Rows of (name, value, ...) as `tensors.html` shows them; the request says which, and in which order.

    Columns called bytes are shown with units, numbers in four digits; a column that holds none is not sorted by.
    """

    size = _SIZE

    def __init__(
        self, columns: Sequence[str], rows: Sequence[Sequence[Any]], asked: Asked, path: str, **query: Any
    ) -> None:
        self.columns, self._path, self.query = columns, path, asked("q")
        self._own = {"path": asked.query.get("path"), **query}
        numeric = [i for i in range(1, len(columns)) if any(isinstance(row[i], (int, float)) for row in rows[:50])]
        self.sorts = [("", "order"), ("0", columns[0]), *((str(i), columns[i]) for i in numeric)]
        self.sort = asked("sort")
        if self.sort not in dict(self.sorts):
            names = ", ".join(key for key, _ in self.sorts if key)
            raise RecipeError(f"sort = {self.sort[:40]}: the number of a column is expected, one of {names}")
        words = self.query.lower().split()
        chosen = [row for row in rows if all(word in str(row[0]).lower() for word in words)]
        if self.sort == "0":
            chosen.sort(key=lambda row: str(row[0]))
        elif self.sort:
            place = int(self.sort)
            chosen.sort(key=lambda row: -_number(row[place]))
        self.total = len(chosen)
        self.first = min(asked.number("first", 0, 10_000_000), max(0, self.total - 1)) // _SIZE * _SIZE
        shown = chosen[self.first : self.first + _SIZE]
        self.rows = [[self._cell(value, column) for value, column in zip(row, columns, strict=True)] for row in shown]

    @property
    def source(self) -> str:
        return address(self._path, **self._own)

    def page(self, first: int) -> str:
        return address(self._path, **self._own, q=self.query, sort=self.sort, first=max(first, 0))

    def _cell(self, value: Any, column: str) -> str:
        if value is None:
            return "–"
        if column == "bytes":
            return size(value)
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and value == value else float("-inf")
