"""Tables: number formats, Markdown, rich and HTML, and marked places in a file."""

from __future__ import annotations

import io
import re

import pytest

from weightsmith.core.errors import OutputError
from weightsmith.report.table import Column, Table, html, markdown, rich_table, write_markdown

COLUMNS = (Column("name", "run"), Column("share", "kept", 0, percent=True), Column("loss", "loss|nats", 2))
TABLE = Table(
    "Runs",
    COLUMNS,
    [
        {"name": "a|b", "kind": 1, "share": 0.425, "loss": 1.0},
        {"name": "<c>", "kind": 2, "share": -0.999, "loss": None},
    ],
    notes=("a note",),
    group="kind",
    strong=frozenset({1}),
)


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        (Column("x", "x"), 1.25, "1.2"),
        (Column("x", "x", 3), 1.25, "1.250"),
        (Column("x", "x", 0, percent=True), 0.5, "50%"),
        (Column("x", "x", 1, percent=True), -0.1234, "−12.3%"),
        (Column("x", "x", 1), -0.01, "0.0"),
        (Column("x", "x", 1, signed=True), 0.0, "0.0"),
        (Column("x", "x", 1, signed=True, unit=" s"), 2.0, "+2.0 s"),
        (Column("x", "x"), 12, "12"),
        (Column("x", "x"), None, "–"),
        (Column("x", "x"), "word", "word"),
        (Column("x", "x"), True, "True"),
    ],
)
def test_a_cell_is_shown_with_its_columns_format(column: Column, value: object, shown: str) -> None:
    assert column.show({"x": value}) == shown


def test_a_missing_value_shows_as_a_dash() -> None:
    assert Column("x", "x").show({}) == "–"


def test_markdown_escapes_bars_aligns_numbers_and_stresses_rows() -> None:
    assert markdown(TABLE) == (
        "| run | kept | loss\\|nats |\n"
        "| --- | ---: | ---: |\n"
        "| a\\|b | 42% | 1.00 |\n"
        "| **<c>** | **−100%** | **–** |\n"
        "\n"
        "a note\n"
    )


def test_rich_shows_every_cell() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(rich_table(TABLE))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(part in text for part in ("Runs", "a|b", "42%", "<c>", "−100%", "a note"))


def test_square_brackets_are_text_to_rich() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(rich_table(Table("[bold]T", (Column("x", "[red]x"),), [{"x": "[/]"}])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(part in text for part in ("[bold]T", "[red]x", "[/]"))


def test_html_escapes_and_marks_rows() -> None:
    text = html(TABLE)
    assert "&lt;c&gt;" in text
    assert "<c>" not in text
    assert re.findall(r'<tr class="(.*?)">', text) == ["last", "strong"]
    assert '<td class="number">42%</td>' in text


def test_a_marked_place_is_replaced_and_nothing_else(tmp_path) -> None:
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- demo -->\nold \\1\n<!-- /demo -->\nafter\n", "utf-8")
    write_markdown(file, "demo", "new \\1 \\g<0>\n")
    assert file.read_text("utf-8") == "before\n<!-- demo -->\nnew \\1 \\g<0>\n<!-- /demo -->\nafter\n"


def test_a_file_without_the_marks_is_refused_and_left_alone(tmp_path) -> None:
    file = tmp_path / "README.md"
    file.write_text("nothing\n", "utf-8")
    with pytest.raises(OutputError, match=r"README\.md: 0 places marked 'demo'.*<!-- demo -->"):
        write_markdown(file, "demo", "new")
    assert file.read_text("utf-8") == "nothing\n"
