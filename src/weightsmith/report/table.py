"""One table, three ways to show it: in a terminal, in Markdown, in HTML.

    table = Table("Runs", (Column("name", "Run"), Column("loss", "Loss")), rows=[{"name": "a", "loss": 0.5}])
    print(markdown(table))

A cell that is None shows as an en dash, a number with its column's decimals, anything else as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["Column", "Table", "html", "markdown", "rich_table", "write_markdown"]

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column: the key it reads from a record, its heading, and how a number looks.

    percent  the number is a share: 0.5 is shown as 50%
    unit     written behind each number
    signed   positive numbers get a plus sign
    meaning  a sentence for the reader; shown when the mouse rests on the heading
    """

    key: str
    title: str
    decimals: int = 1
    percent: bool = False
    unit: str = ""
    signed: bool = False
    meaning: str = ""

    def show(self, record: Mapping[str, Any]) -> str:
        """The cell's text."""
        value = record.get(self.key)
        if value is None:
            return MISSING
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return str(value)
        if isinstance(value, float):
            value = value * 100 if self.percent else value
            value = round(value, self.decimals) + 0.0  # no '-0.0'
            text = f"{value:{'+' if self.signed and value else ''}.{self.decimals}f}"
        else:
            text = f"{value:{'+' if self.signed and value else ''}d}"
        return text.replace("-", "−") + ("%" if self.percent else self.unit)


@dataclass(frozen=True)
class Table:
    """Records under columns.  A change of the value under `group` draws a line."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    group: str = ""
    strong: frozenset[int] = field(default_factory=frozenset)  # rows to stress

    def cells(self) -> list[list[str]]:
        """Every cell as text, row by row."""
        return [[column.show(record) for column in self.columns] for record in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and are set to the right."""
        return [any(_is_number(record.get(column.key)) for record in self.rows) for column in self.columns]

    def ends_group(self, index: int) -> bool:
        """Whether a line belongs under this row."""
        if not self.group or index + 1 >= len(self.rows):
            return False
        return bool(self.rows[index].get(self.group) != self.rows[index + 1].get(self.group))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rich_table(table: Table) -> RichTable:
    """The table for a terminal: `rich.print(rich_table(table))`."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as plain
    from rich.table import Table as RichTable

    shown = RichTable(
        title=plain(table.title),
        caption=plain("\n".join(table.notes)) or None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    rows = table.cells()
    for at, (column, number) in enumerate(zip(table.columns, table.numeric(), strict=True)):
        widest = max((len(cells[at]) for cells in rows), default=1)  # headings may wrap, cells may not
        shown.add_column(plain(column.title), justify="right" if number else "left", min_width=widest)
    for index, cells in enumerate(rows):
        style = "bold" if index in table.strong else None
        shown.add_row(*map(plain, cells), style=style, end_section=table.ends_group(index))
    return shown


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, notes below; ends with a newline."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [
        line([_cell(column.title) for column in table.columns]),
        line(["---:" if number else "---" for number in table.numeric()]),
    ]
    for index, cells in enumerate(table.cells()):
        texts = [_cell(text) for text in cells]
        lines.append(line([f"**{text}**" if text and index in table.strong else text for text in texts]))
    for note in table.notes:
        lines += ["", note]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def write_markdown(file: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a file.

    Raises OutputError if the file has no such pair of marks.
    """
    old = file.read_text("utf-8")
    marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    new, count = marks.subn(lambda found: found[1] + text.rstrip("\n") + "\n" + found[2], old)
    if count != 1:
        raise OutputError(
            f"{file}: {count} places marked {name!r}, one is needed; write <!-- {name} --> and <!-- /{name} --> on "
            "lines of their own"
        )
    file.write_text(new, "utf-8")


def html(table: Table) -> str:
    """The table as an HTML fragment; styled by `weightsmith.report.html.page`."""
    number = table.numeric()
    rows = table.cells()
    kind = ["number" if is_number else "long" if any(len(cells[i]) > _LONG for cells in rows) else ""
            for i, is_number in enumerate(number)]  # fmt: skip
    head = "".join(
        f"<th{_attributes(kind[i], column.meaning)}>{escape(column.title)}</th>"
        for i, column in enumerate(table.columns)
    )
    body = []
    for index, cells in enumerate(rows):
        kinds = " ".join(["strong"] * (index in table.strong) + ["last"] * table.ends_group(index))
        texts = "".join(f"<td{_attributes(kind[i])}>{escape(text)}</td>" for i, text in enumerate(cells))
        body.append(f'<tr class="{kinds}">{texts}</tr>' if kinds else f"<tr>{texts}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<figure class="table"><figcaption>{escape(table.title)}</figcaption><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{notes}</figure>"
    )


_LONG = 60  # letters; longer texts are broken into lines


def _attributes(kind: str, meaning: str = "") -> str:
    return (f' class="{kind}"' if kind else "") + (f' title="{escape(meaning)}"' if meaning else "")
