"""Sections to one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from weightsmith.core.errors import MissingExtra
from weightsmith.report.table import Table
from weightsmith.report.table import html as table_html

__all__ = ["Figure", "Section", "Text", "page"]


@dataclass(frozen=True)
class Text:
    """A heading (may be empty) and paragraphs of plain text."""

    title: str
    paragraphs: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A plotly figure: `data` and `layout` as plotly.js takes them (`go.Figure.to_plotly_json()`).

    Colours of text, grid and background follow the reader's light or dark setting and need not be given.
    """

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    note: str = ""
    height: int = 380


Section = Text | Table | Figure


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a whole HTML document.  plotly.js (about 5 MB) goes in once, and only if there is a figure.

    Raises MissingExtra if there is a figure and plotly is not installed.
    """
    body = "\n".join(_section(section, f"figure{number}") for number, section in enumerate(sections))
    scripts = ""
    if any(isinstance(section, Figure) for section in sections):
        scripts = f"<script>{_plotly_js()}</script>\n<script>{_DRAW}</script>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main>\n{scripts}</body></html>\n"
    )


def _section(section: Section, name: str) -> str:
    match section:
        case Text():
            heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
            return heading + "".join(f"<p>{escape(text)}</p>" for text in section.paragraphs)
        case Table():
            return table_html(section)
        case Figure():
            values = json.dumps({"data": section.data, "layout": section.layout}, allow_nan=False)
            values = values.replace("<", "\\u003c")  # a text in it cannot end the script element
            note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
            return (
                f"<figure><figcaption>{escape(section.title)}</figcaption>"
                f'<div class="plot" id="{name}" style="height:{section.height}px"></div>'
                f'<script type="application/json" data-for="{name}">{values}</script>{note}</figure>'
            )


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtra("plotly", "report", "a report with figures") from None
    return str(get_plotlyjs()).replace("</script", "<\\/script")


_STYLE = """
:root { --page: #fff; --ink: #1c2330; --soft: #5b6678; --line: #d9dee7; --stripe: #f5f7fa; --accent: #0b6bcb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181f; --ink: #e6eaf1; --soft: #9aa6b8; --line: #333c4a; --stripe: #1b212a; --accent: #6cb2ff; }
}
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.4em 0 0.6em; }
h2 { font-size: 1.25rem; margin: 2.2em 0 0.4em; border-bottom: 1px solid var(--line); padding-bottom: 0.25em; }
p { max-width: 80ch; margin: 0.6em 0; }
figure { margin: 1.4em 0; }
figcaption { font-weight: 600; margin-bottom: 0.4em; }
.note { color: var(--soft); font-size: 0.87rem; margin: 0.35em 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.34em 0.7em; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; color: var(--soft); font-weight: 600;
  white-space: normal; }
th[title] { text-decoration: underline dotted var(--line); cursor: help; }
td { border-bottom: 1px solid var(--line); }
tr.last td { border-bottom: 2px solid var(--soft); }
tr.strong td { font-weight: 600; color: var(--accent); }
tbody tr:hover { background: var(--stripe); }
th.number, td.number { text-align: right; }
@media print { main { max-width: none; } }
"""

_DRAW = """
(function () {
  function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function themed(layout) {
    var axis = { gridcolor: colour("--line"), zerolinecolor: colour("--soft"), linecolor: colour("--line") };
    var own = Object.assign({ margin: { l: 60, r: 20, t: 10, b: 50 }, autosize: true }, layout);
    own.paper_bgcolor = own.plot_bgcolor = "rgba(0,0,0,0)";
    own.font = Object.assign({ color: colour("--ink"), family: "system-ui, sans-serif", size: 13 }, layout.font || {});
    own.hoverlabel = { bgcolor: colour("--stripe"), font: { color: colour("--ink") }, bordercolor: colour("--line") };
    ["xaxis", "yaxis"].concat(Object.keys(layout)).forEach(function (key) {
      if (/^[xy]axis[0-9]*$/.test(key)) { own[key] = Object.assign({}, axis, layout[key] || {}); }
    });
    return own;
  }
  function draw() {
    document.querySelectorAll("script[data-for]").forEach(function (script) {
      var figure = JSON.parse(script.textContent);
      figure.data.forEach(function (trace) {
        if (trace.type === "heatmap") { trace.textfont = Object.assign({ color: colour("--ink") }, trace.textfont); }
      });
      Plotly.react(script.dataset.for, figure.data, themed(figure.layout),
        { responsive: true, displaylogo: false, displayModeBar: false });
    });
  }
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
"""
