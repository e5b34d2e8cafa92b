"""Bar charts as SVG text, for places that show no script (a README)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Bar", "Panel", "bars"]

_ROW, _TOP, _BOTTOM, _LABEL, _VALUE = 26, 54, 34, 132, 56  # pixels; labels of more than 16 letters get more room
_LETTER = 7
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1c2330; }
.title { font-weight: 600; font-size: 14px; } .soft { fill: #5b6678; font-size: 12px; }
.grid { stroke: #d9dee7; } .zero { stroke: #5b6678; } .whisker { stroke: #1c2330; stroke-width: 1.4; }
.bar { fill: #3b82c4; } .below { fill: #c4573b; } .other { fill: #9aa6b8; } .page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaf1; } .soft { fill: #9aa6b8; } .grid { stroke: #333c4a; } .zero { stroke: #9aa6b8; }
  .whisker { stroke: #e6eaf1; } .page { fill: #0d1117; }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: a share (1 = 100%), the half length of its whisker, and whether it is only there to compare with."""

    label: str
    value: float
    spread: float | None = None
    other: bool = False


@dataclass(frozen=True)
class Panel:
    """Bars under one title."""

    title: str
    bars: Sequence[Bar]


def bars(panels: Sequence[Panel], caption: str, width: int = 860) -> str:
    """Horizontal bars of shares, panels side by side on one scale.  Negative bars are drawn in another colour."""
    every = [bar for panel in panels for bar in panel.bars]
    reach = [(bar.value - (bar.spread or 0), bar.value + (bar.spread or 0)) for bar in every]
    low = min(0.0, math.floor(5 * min(a for a, _ in reach)) / 5)
    high = max(1.0, math.ceil(5 * max(b for _, b in reach)) / 5)
    rows = max(len(panel.bars) for panel in panels)
    label = max(_LABEL, 20 + _LETTER * max(len(bar.label) for bar in every))
    height = _TOP + _ROW * rows + _BOTTOM + 22
    each = width / len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(caption, {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, number * each, each, label, low, high, rows)
    parts.append(f'<text class="soft" x="16" y="{height - 12}">{escape(caption)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, width: float, label: float, low: float, high: float, rows: int) -> list[str]:
    start, end = left + label, left + width - _VALUE
    bottom = _TOP + _ROW * rows

    def place(value: float) -> float:
        return start + (end - start) * (value - low) / (high - low)

    parts = [f'<text class="title" x="{left + 16:.0f}" y="28">{escape(panel.title)}</text>']
    step = 0.2 * math.ceil(round((high - low) / 0.2) / 6)  # at most seven ticks, zero among them
    for tick in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = step * tick
        kind = "grid" if tick else "zero"
        x = place(value)
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_percent(value)}</text>')
    for row, bar in enumerate(panel.bars):
        y = _TOP + _ROW * row
        a, b = sorted((place(0.0), place(bar.value)))
        kind = "other" if bar.other else "below" if bar.value < 0 else "bar"
        middle = y + 9
        parts.append(f'<text x="{start - 8:.1f}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>')
        parts.append(f'<rect class="{kind}" x="{a:.1f}" y="{y}" width="{max(b - a, 0.5):.1f}" height="18" rx="2"/>')
        tip = max(b, place(0.0))
        if bar.spread is not None:
            c, d = place(bar.value - bar.spread), place(bar.value + bar.spread)
            parts.append(
                f'<path class="whisker" d="M{c:.1f} {middle}H{d:.1f}M{c:.1f} {middle - 4}v8M{d:.1f} {middle - 4}v8"/>'
            )
            tip = max(tip, d)
        parts.append(f'<text x="{tip + 6:.1f}" y="{y + 14}">{_percent(bar.value)}</text>')
    return parts


def _percent(value: float) -> str:
    return f"{round(100 * value) + 0:d}%".replace("-", "−")
