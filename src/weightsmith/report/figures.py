"""Bars, heat maps and curves as HTML and SVG, drawn here: no script, nothing to load, readable at any width.

Bars and heat maps are laid out by the browser.  What has axes is drawn twice, for wide and for narrow screens, and the
style shows one of the two.  Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["BLUE", "BOTH", "RED", "STYLE", "Bars", "Curve", "Curves", "Figure", "Heat", "LabelledBar", "Points",
           "figure", "scatter"]  # fmt: skip

Number = float | None

BLUE, RED, BOTH = "blue", "red", "both"
"""Colours of a heat map: from grey to blue, from grey to red, from red over grey to blue."""

_INK = {"blue": "59,130,196", "red": "196,87,59"}
_LINES = ("#3b82c4", "#c4573b", "#3a9d6e", "#a067c4", "#b8860b", "#7a8799")


@dataclass(frozen=True)
class LabelledBar:
    """One bar: its label, value, the text at its end, half the length of its whisker, and what a pointer shows."""

    label: str
    value: float
    text: str
    colour: str = _LINES[0]
    spread: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0 on, under a title; `axis` says what is drawn."""

    title: str
    bars: Sequence[LabelledBar]
    axis: str
    note: str = ""


@dataclass(frozen=True)
class Heat:
    """Values in rows and columns, written in and coloured; None stays empty.

    values  what the colours show: [down][across]; `texts`: what is written in; `about`: what a pointer shows
    span    the values of the first and last colour; of BOTH the middle is in the middle between them
    legend  what the colours mean
    """

    title: str
    down: Sequence[str]
    across: Sequence[str]
    values: Sequence[Sequence[Number]]
    texts: Sequence[Sequence[str]]
    colours: str
    span: tuple[float, float]
    legend: str = ""
    note: str = ""
    about: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Points:
    """Named points (name, x > 0, y); x is drawn by its logarithm.  A name that finds no room is shown by a pointer."""

    title: str
    points: Sequence[tuple[str, float, float]]
    x: str
    y: str
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) in order."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Curves:
    """Lines over one pair of axes that hold 0."""

    title: str
    curves: Sequence[Curve]
    x: str
    y: str
    note: str = ""


Figure = Bars | Heat | Points | Curves


def figure(drawn: Figure) -> str:
    """The figure as an HTML fragment; styled by `STYLE`."""
    body = _BODIES[type(drawn)](drawn)
    note = f'<p class="note">{escape(drawn.note)}</p>' if drawn.note else ""
    return f"<figure><figcaption>{escape(drawn.title)}</figcaption>{body}{note}</figure>"


# --- laid out by the browser ---------------------------------------------------------------------


def _bars(drawn: Bars) -> str:
    reach = [end for bar in drawn.bars for end in (bar.value - (bar.spread or 0), bar.value + (bar.spread or 0))]
    low, high = min(0.0, *reach), max(0.0, *reach)
    width = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{100 * (value - low) / width:.2f}%"

    rows = []
    for bar in drawn.bars:
        start, end = sorted((0.0, bar.value))
        about = f' title="{escape(bar.about)}"' if bar.about else ""
        whisker = ""
        if bar.spread:
            left, right = place(bar.value - bar.spread), f"{100 * 2 * bar.spread / width:.2f}%"
            whisker = f'<i class="whisker" style="left:{left};width:{right}"></i>'
        length = f"{100 * (end - start) / width:.2f}%"
        rows.append(
            f'<span class="name">{escape(bar.label)}</span><span class="track"{about}>'
            f'<i class="bar" style="left:{place(start)};width:{length};background:{bar.colour}"></i>{whisker}'
            f'<b style="left:{place(0.0)}">{escape(bar.text)}</b></span>'
        )
    return f'<div class="bars">{"".join(rows)}</div><p class="axis">{escape(drawn.axis)}</p>'


def _heat(drawn: Heat) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in drawn.across)
    body = []
    for i, (name, row) in enumerate(zip(drawn.down, drawn.values, strict=True)):
        cells = []
        for j, value in enumerate(row):
            about = escape(drawn.about[i][j]) if drawn.about else f"{escape(name)}, {escape(drawn.across[j])}"
            ink = f' style="background:{_colour(value, drawn)}"' if value is not None else ""
            cells.append(f'<td title="{about}"{ink}>{escape(drawn.texts[i][j])}</td>')
        body.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll heat">{table}</div>{_legend(drawn)}'


def _colour(value: float, drawn: Heat) -> str:
    low, high = drawn.span
    share = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
    if drawn.colours != BOTH:
        return f"rgba({_INK[drawn.colours]},{0.05 + 0.75 * share:.2f})"
    return f"rgba({_INK['blue' if share > 0.5 else 'red']},{1.4 * abs(share - 0.5) + 0.03:.2f})"


def _legend(drawn: Heat) -> str:
    low, high = drawn.span
    steps = [low + (high - low) * i / 8 for i in range(9)]
    colours = ", ".join(_colour(step, drawn) for step in steps)
    text = f" {escape(drawn.legend)}" if drawn.legend else ""
    ends = [(_short(low, digits), _short(high, digits)) for digits in range(3, 8)]
    first, end = next((pair for pair in ends if pair[0] != pair[1]), ends[0])  # 415.8 to 416.3 are not both 416
    return (
        f'<p class="axis">{first} <i class="scale" style="background:linear-gradient(90deg, {colours})"></i> '
        f"{end}{text}</p>"
    )


def _short(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}".replace("-", "−")


# --- drawn for two widths ------------------------------------------------------------------------

_WIDE, _NARROW = (1160, 440), (360, 400)
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 46
_LETTER, _LINE = 6.3, 13  # of a label of 11 pixels


@dataclass(frozen=True)
class _Frame:
    """Axes in a picture of some size."""

    size: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        width, height = self.size[0] - _LEFT - _RIGHT, self.size[1] - _TOP - _BOTTOM
        across, up = ((v - a) / ((b - a) or 1.0) for v, (a, b) in ((x, self.x), (y, self.y)))
        return _LEFT + width * across, _TOP + height * (1 - up)


def _points(drawn: Points) -> str:
    points = [(name, math.log10(x), y) for name, x, y in drawn.points]
    return scatter(points, drawn.x, drawn.y, drawn.title, powers=True)


def scatter(
    points: Sequence[tuple[str, float, float]],
    x: str,
    y: str,
    title: str,
    *,
    powers: bool = False,
    mark: frozenset[str] | None = None,
) -> str:
    """Named points over two axes, drawn for both widths.

    powers  the first numbers are logarithms;  mark: names of the class `on`, all others being `off`
    """
    if not points:
        return ""
    xs, ys = [a for _, a, _ in points], [b for _, _, b in points]
    across, up = _widened(min(xs), max(xs), 0.06), _widened(min(ys), max(ys), 0.1)

    def draw(size: tuple[int, int]) -> str:
        frame = _Frame(size, across, up)
        steps = _powers(*across) if powers else _ticks(*across)
        parts = [*_axes(frame, steps, _ticks(*up), x, y, power=powers)]
        spots = [frame.place(a, b) for a, b in zip(xs, ys, strict=True)]
        taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in spots]
        for (name, value, share), (a, b) in zip(points, spots, strict=True):
            about = f"{name}: {_short(10**value if powers else value)}, {_short(share)}"
            kind = "" if mark is None else f' class="{"on" if name in mark else "off"}"'
            parts.append(f'<circle{kind} cx="{a:.1f}" cy="{b:.1f}" r="5"><title>{escape(about)}</title></circle>')
            if (spot := _room(name, a, b, taken, size)) is not None:
                taken.append(spot)
                parts.append(f'<text class="tag" x="{spot[0]:.1f}" y="{spot[3] - 3:.1f}">{escape(name)}</text>')
        return _svg(size, parts, title)

    return _twice(draw)


def _room(
    name: str, x: float, y: float, taken: Sequence[tuple[float, float, float, float]], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """A box beside a point for its name that covers nothing: above, right, below or left of it."""
    width = _LETTER * len(name)
    for left, top in ((x - width / 2, y - 20), (x + 8, y - 6), (x - width / 2, y + 7), (x - width - 8, y - 6)):
        box = (left, top, left + width, top + _LINE)
        inside = box[0] >= _LEFT and box[2] <= size[0] - 2 and box[1] >= 0 and box[3] <= size[1] - _BOTTOM
        if inside and not any(a < box[2] and c > box[0] and b < box[3] and d > box[1] for a, b, c, d in taken):
            return box
    return None


_FEW = 12
"""Points of a curve that are marked; a curve of one is nothing else."""


def _curves(drawn: Curves) -> str:
    x = (0.0, max((max(curve.x) for curve in drawn.curves), default=1.0))
    least = min((min(curve.y) for curve in drawn.curves), default=0.0)
    y = (min(0.0, least), max((max(curve.y) for curve in drawn.curves), default=1.0))

    def draw(size: tuple[int, int]) -> str:
        frame = _Frame(size, x, y)
        parts = [*_axes(frame, _ticks(*x), _ticks(*y), drawn.x, drawn.y)]
        for i, curve in enumerate(drawn.curves):
            spots = [frame.place(a, b) for a, b in zip(curve.x, curve.y, strict=True)]
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
            colour = _LINES[i % len(_LINES)]
            about = f"<title>{escape(curve.name)}</title>"
            parts.append(f'<path d="{path}" stroke="{colour}">{about}</path>')
            few = spots if len(spots) <= _FEW else ()
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" style="fill:{colour}">{about}</circle>' for a, b in few
            ]
        return _svg(size, parts, drawn.title)

    names = "".join(
        f'<span><i style="background:{_LINES[i % len(_LINES)]}"></i>{escape(curve.name)}</span>'
        for i, curve in enumerate(drawn.curves)
    )
    return _twice(draw) + f'<p class="names">{names}</p>'


def _twice(draw: Callable[[tuple[int, int]], str]) -> str:
    return f'<div class="wide">{draw(_WIDE)}</div><div class="slim">{draw(_NARROW)}</div>'


def _svg(size: tuple[int, int], parts: Sequence[str], title: str) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">{inner}</svg>'


def _axes(
    frame: _Frame, across: Sequence[float], up: Sequence[float], x: str, y: str, power: bool = False
) -> Iterator[str]:
    """Lines, numbers (`power`: of 10 across) and what they are."""
    left, bottom = frame.place(frame.x[0], frame.y[0])
    right, top = frame.place(frame.x[1], frame.y[1])
    up = _readable(up)
    texts = [_short(10**value) for value in across] if power else _apart(across)
    if len(set(texts)) < len(texts):
        texts = _apart([10**value for value in across])
    for value, text in zip(across, texts, strict=True):
        place, _ = frame.place(value, frame.y[0])
        yield f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{text}</text>'
    for value, text in zip(up, _apart(up), strict=True):
        _, place = frame.place(frame.x[0], value)
        yield f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{place:.1f}" y2="{place:.1f}"/>'
        yield f'<text x="{left - 6:.1f}" y="{place + 4:.1f}" text-anchor="end">{text}</text>'
    middle = (left + right) / 2
    yield f'<text class="soft" x="{middle:.1f}" y="{bottom + 36:.1f}" text-anchor="middle">{escape(x)}</text>'
    turn = (top + bottom) / 2
    yield (
        f'<text class="soft" x="11" y="{turn:.1f}" text-anchor="middle" transform="rotate(-90 11 {turn:.1f})">'
        f"{escape(y)}</text>"
    )


def _apart(ticks: Sequence[float]) -> list[str]:
    """Evenly spaced numbers with as many digits behind the point as tell them apart."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits > 6:
        return [_short(value) for value in ticks]
    return [f"{value:.{digits}f}".replace("-", "−") for value in ticks]


def _readable(ticks: Sequence[float]) -> Sequence[float]:
    """Without those of more digits than there is room for, if two are left."""
    texts = _apart(ticks)
    if max(map(len, texts), default=0) <= 5:
        return ticks
    fewer = [value for value, text in zip(ticks, texts, strict=True) if "." in text and text.endswith("0")]
    return fewer if len(fewer) > 1 else ticks


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    room = share * (high - low) or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers from low to high."""
    raw = (high - low) / 6 or 1.0
    unit: float = 10.0 ** math.floor(math.log10(raw))
    step = next(step * unit for step in (1, 2, 5, 10) if step * unit >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Logarithms of powers of ten from low to high; where there are few of 2 and 5 times them, of any."""
    digits = (1,) if high - low > 3 else (1, 2, 5)
    every = (power + math.log10(digit) for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits)
    found = [place for place in every if low <= place <= high]
    return found if len(found) > 1 else [math.log10(tick) for tick in _ticks(10**low, 10**high)]


_BODIES: dict[type, Callable[..., str]] = {Bars: _bars, Heat: _heat, Points: _points, Curves: _curves}

STYLE = """
.bars { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 4px 10px; align-items: center;
  font-size: 0.9rem; }
.bars .name { text-align: right; overflow-wrap: anywhere; }
.bars .track { position: relative; height: 1.4rem; background: var(--stripe); }
.bars .bar { position: absolute; top: 0; bottom: 0; opacity: 0.75; }
.bars .whisker { position: absolute; top: 50%; border-top: 2px solid var(--ink); }
.bars b { position: absolute; top: 0; padding-left: 6px; line-height: 1.4rem; font-weight: 500; white-space: nowrap; }
.axis { color: var(--soft); font-size: 0.87rem; margin: 0.4em 0; }
.axis .scale { display: inline-block; width: 8rem; height: 0.7rem; border: 1px solid var(--line); }
.heat table { width: auto; border-collapse: separate; border-spacing: 2px; }
.heat td, .heat th { border: 0; padding: 0.25em 0.6em; text-align: center; }
.heat td { min-width: 3em; }
.heat thead th { min-width: 3em; }
.heat tbody th { text-align: right; white-space: normal; overflow-wrap: break-word; max-width: 15rem;
  position: sticky; left: 0; background: var(--page); }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--ink); } svg .soft { fill: var(--soft); } svg .tag { font-size: 11px; }
svg line { stroke: var(--line); } svg circle { fill: #3b82c4; } svg path { fill: none; stroke-width: 2; }
.slim { display: none; }
.names span { margin-right: 1.2em; white-space: nowrap; } .names { font-size: 0.9rem; max-width: none; }
.names i { display: inline-block; width: 1.4em; height: 3px; margin-right: 0.5em; vertical-align: middle; }
@media (max-width: 640px) {
  .wide { display: none; } .slim { display: block; }
  .heat td, .heat th { padding: 0.25em 0.35em; } .heat tbody th { max-width: 8.5rem; }
}
"""
