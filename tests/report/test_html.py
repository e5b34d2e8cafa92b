"""The HTML page stands alone: one file, nothing loaded from elsewhere, nothing that a text in it can break."""

from __future__ import annotations

import builtins
import json
import re
from html.parser import HTMLParser

import pytest

from weightsmith.core.errors import MissingExtra
from weightsmith.report.html import Figure, Text, page
from weightsmith.report.table import Column, Table

FIGURE = Figure("Bars", [{"type": "bar", "x": [1, 2], "y": [3, 4], "name": "</script><b>"}], {"xaxis": {"title": "n"}})
TABLE = Table("T", (Column("x", "x"),), [{"x": 1.0}])


class Elements(HTMLParser):
    """Collects elements with their attributes, and complains about ends without a start."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed() -> None:
    elements = Elements(page("Title", [Text("One", ("words",)), TABLE, FIGURE, FIGURE]))
    assert elements.open == []
    tags = [tag for tag, _ in elements.found]
    assert not {"link", "iframe", "img", "object"} & set(tags)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    scripts = [attributes for tag, attributes in elements.found if tag == "script"]
    assert len(scripts) == 4  # two figures' values, plotly once, the drawing


def test_the_style_loads_nothing() -> None:
    style = re.search(r"<style>(.*?)</style>", page("T", []), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]


def test_a_page_without_figures_needs_no_plotly() -> None:
    assert len(page("T", [Text("a", ("b",)), TABLE])) < 10_000


def test_figure_values_survive_the_way_into_the_page() -> None:
    found = re.search(r'<script type="application/json" data-for="figure0">(.*?)</script>', page("T", [FIGURE]))
    assert found is not None
    assert json.loads(found[1]) == {"data": FIGURE.data, "layout": FIGURE.layout}


def test_texts_are_escaped() -> None:
    text = page("<i>", [Text("<u>", ("<script>",))])
    assert "<i>" not in text
    assert "<u>" not in text
    assert "<script>" not in text


def test_a_number_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        page("T", [Figure("F", [{"y": [float("nan")]}], {})])


def test_a_missing_plotly_is_named(monkeypatch) -> None:
    real = builtins.__import__

    def without_plotly(name: str, *rest: object, **more: object) -> object:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(MissingExtra, match=r"report with figures needs plotly; .*install 'weightsmith\[report\]'"):
        page("T", [FIGURE])
