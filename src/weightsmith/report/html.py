"""Sections to one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weightsmith.report.figures import STYLE, Figure, figure
from weightsmith.report.pareto import PICKER_STYLE, Picker, picker
from weightsmith.report.table import Table
from weightsmith.report.table import html as table_html

__all__ = ["Section", "Text", "page"]


@dataclass(frozen=True)
class Text:
    """A heading (may be empty) and paragraphs of plain text."""

    title: str
    paragraphs: Sequence[str] = ()


Section = Text | Table | Figure | Picker


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a whole HTML document, without a script."""
    body = "\n".join(map(_section, sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}{STYLE}{PICKER_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


def _section(section: Section) -> str:
    if isinstance(section, Text):
        heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
        return heading + "".join(f"<p>{escape(text)}</p>" for text in section.paragraphs)
    if isinstance(section, Picker):
        return picker(section)
    return table_html(section) if isinstance(section, Table) else figure(section)


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
h1 { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.34em 0.6em; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; color: var(--soft); font-weight: 600;
  white-space: normal; }
th[title] { text-decoration: underline dotted var(--line); cursor: help; }
td { border-bottom: 1px solid var(--line); }
tr.last td { border-bottom: 2px solid var(--soft); }
tr.strong td { font-weight: 600; color: var(--accent); }
tbody tr:hover { background: var(--stripe); }
th.number, td.number { text-align: right; }
td.long { white-space: normal; min-width: 20rem; }
.table td:first-child, .table th:first-child { position: sticky; left: 0; background: var(--page); }
@media (max-width: 640px) {
  main { padding: 12px 12px 48px; } th, td { padding: 0.34em 0.45em; }
  .table td:first-child { white-space: normal; max-width: 9rem; overflow-wrap: break-word; }
}
@media print { main { max-width: none; } }
"""
