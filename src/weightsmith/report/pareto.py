"""A picker of compromises: several pairs of figures, one shown at a time, the points on the front filled.

Chosen by radio buttons and styled by `:has`, so that the page needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weightsmith.report.figures import scatter

__all__ = ["PICKER_STYLE", "Panel", "Picker", "front_of", "picker"]

Point = tuple[str, float, float]

MOST = 21
"""Panels at most: seven domains in pairs."""

PICKER_STYLE = "\n".join(
    [".picker .panel { display: none; } .picker label { margin-right: 1em; white-space: nowrap; }",
     ".picker .off { fill: none; stroke: #7a8799; } .picker .on { fill: #3b82c4; }"]
    + [f".picker:has(label:nth-of-type({n}) :checked) .panel:nth-of-type({n}) {{ display: block; }}"
       for n in range(1, MOST + 1)]
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """Named points (name, x, y); more is better, of x less where it is a cost.  powers: x is drawn by its logarithm."""

    title: str
    x: str
    y: str
    points: Sequence[Point]
    less_across: bool = False
    powers: bool = False


@dataclass(frozen=True)
class Picker:
    """Panels under one title."""

    title: str
    panels: Sequence[Panel]
    note: str = ""


def front_of(panel: Panel) -> frozenset[str]:
    """The names that no other point dominates."""
    sign = -1 if panel.less_across else 1
    points = [(name, sign * x, y) for name, x, y in panel.points]
    return frozenset(
        name for name, x, y in points
        if not any(a >= x and b >= y and (a > x or b > y) for _, a, b in points)
    )  # fmt: skip


def picker(drawn: Picker) -> str:
    """The picker as an HTML fragment; styled by PICKER_STYLE."""
    panels = [panel for panel in drawn.panels if panel.points][:MOST]
    if not panels:
        return ""
    group = "pick-" + "".join(c for c in drawn.title.lower() if c.isalnum())
    buttons = "".join(
        f'<label><input type="radio" name="{group}"{" checked" * (at == 0)}>{escape(panel.title)}</label> '
        for at, panel in enumerate(panels)
    )
    bodies = "".join(f'<section class="panel">{_panel(panel)}</section>' for panel in panels)
    note = f'<p class="note">{escape(drawn.note)}</p>' if drawn.note else ""
    return f'<figure class="picker"><figcaption>{escape(drawn.title)}</figcaption>{buttons}{bodies}{note}</figure>'


def _panel(panel: Panel) -> str:
    front = front_of(panel)
    points = [(name, math.log10(x) if panel.powers else x, y) for name, x, y in panel.points]
    shown = scatter(points, panel.x, panel.y, panel.title, powers=panel.powers, mark=front)
    return shown + f'<p class="note">Not dominated: {escape(", ".join(sorted(front)))}.</p>'
