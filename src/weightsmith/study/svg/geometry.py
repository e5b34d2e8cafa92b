"""Shapes as polygons: curves and arcs in straight pieces, strokes as areas, transforms as matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weightsmith.study.svg.parse import Element, numbers, path_commands

__all__ = ["IDENTITY", "ROUND", "Array", "Subpath", "apply", "outline", "stroke", "transform"]

Array = NDArray[np.float64]
Subpath = tuple[Array, bool]
"""Points [n, 2], and whether the last is joined to the first."""

IDENTITY: Array = np.eye(3)
_PIECES = 32  # of one curve
ROUND = 64  # of a full circle

_FUNCTION = re.compile(r"(?<!\w)(\w++)\s*+\(([^()]*+)\)")  # reads every character a fixed number of times

_STEPS = np.linspace(0, 1, _PIECES + 1)[1:, None]
_BERNSTEIN = {
    n: np.concatenate([math.comb(n, i) * (1 - _STEPS) ** (n - i) * _STEPS**i for i in range(n + 1)], 1) for n in (2, 3)
}
"""Degree -> [pieces, control points]: a Bezier curve's points behind its first."""


def apply(matrix: Array, points: Array) -> Array:
    """points [n, 2] under a 3x3 matrix."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def transform(text: str) -> Array:
    """The matrix of a transform attribute; ValueError for an unknown one."""
    whole = IDENTITY
    for name, inside in _FUNCTION.findall(text):
        whole = whole @ _one(name, numbers(inside))
    return whole


def _one(name: str, given: Sequence[float]) -> Array:
    made = np.eye(3)
    if name == "matrix" and len(given) == 6:
        made[:2] = np.array(given).reshape(3, 2).T
    elif name == "translate" and len(given) in (1, 2):
        made[:2, 2] = given[0], given[1] if len(given) == 2 else 0.0
    elif name == "scale" and len(given) in (1, 2):
        made[0, 0], made[1, 1] = given[0], given[-1]
    elif name == "rotate" and len(given) in (1, 3):
        c, s = math.cos(math.radians(given[0])), math.sin(math.radians(given[0]))
        made[:2, :2] = [[c, -s], [s, c]]
        if len(given) == 3:
            centre = np.array(given[1:])
            made[:2, 2] = centre - made[:2, :2] @ centre
    elif name in ("skewX", "skewY") and len(given) == 1:
        made[(0, 1) if name == "skewX" else (1, 0)] = math.tan(math.radians(given[0]))
    else:
        raise ValueError(f"transform {name}({len(given)} numbers)")
    return made


# --- outlines ----------------------------------------------------------------------------------------


def outline(element: Element) -> list[Subpath]:
    """The outline of a basic shape in its own coordinates; [] for one without an extent."""

    def value(name: str, default: float = 0.0) -> float:
        found = numbers(element.attributes.get(name, ""))
        return found[0] if found else default

    if element.name == "rect":
        return _rect(value, element.attributes)
    if element.name in ("circle", "ellipse"):
        rx, ry = (value("r"), value("r")) if element.name == "circle" else (value("rx"), value("ry"))
        return [(_ellipse(value("cx"), value("cy"), rx, ry), True)] if rx > 0 and ry > 0 else []
    if element.name == "line":
        return [(np.array([[value("x1"), value("y1")], [value("x2"), value("y2")]]), False)]
    if element.name in ("polyline", "polygon"):
        found = numbers(element.attributes.get("points", ""))
        points = np.array(found[: len(found) // 2 * 2]).reshape(-1, 2)
        return [(points, element.name == "polygon")] if len(points) > 1 else []
    return _path(element.attributes.get("d", ""))


def _rect(value: object, attributes: dict[str, str]) -> list[Subpath]:
    get = value
    x, y, w, h = (get(name) for name in ("x", "y", "width", "height"))  # type: ignore[operator]
    if w <= 0 or h <= 0:
        return []
    rx, ry = get("rx", -1.0), get("ry", -1.0)  # type: ignore[operator]
    rx, ry = (rx if rx >= 0 else max(ry, 0.0)), (ry if ry >= 0 else max(rx, 0.0))
    rx, ry = min(rx, w / 2), min(ry, h / 2)
    if rx == 0 or ry == 0:
        return [(np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]), True)]
    corners = ((x + w - rx, y + ry, -90), (x + w - rx, y + h - ry, 0), (x + rx, y + h - ry, 90), (x + rx, y + ry, 180))
    arcs = []
    for cx, cy, start in corners:
        angles = np.radians(np.linspace(start, start + 90, ROUND // 4 + 1))
        arcs.append(np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1))
    return [(np.concatenate(arcs), True)]


def _ellipse(cx: float, cy: float, rx: float, ry: float) -> Array:
    angles = np.linspace(0, 2 * math.pi, ROUND, endpoint=False)
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1)


def _disc(centre: Array, radius: float) -> Array:
    return _ellipse(float(centre[0]), float(centre[1]), radius, radius)


class _Pen:
    """Draws a path; `last` is the control point that S and T mirror."""

    def __init__(self) -> None:
        self.done: list[Subpath] = []
        self.points: list[tuple[float, float]] = []
        self.at = self.start = (0.0, 0.0)
        self.last: tuple[str, tuple[float, float]] = ("", (0.0, 0.0))

    def begin(self, to: tuple[float, float]) -> None:
        self.lift(False)
        self.at = self.start = to
        self.points = [to]

    def line(self, to: tuple[float, float]) -> None:
        if not self.points:
            self.points = [self.at]
        self.points.append(to)
        self.at = to

    def curve(self, controls: Sequence[tuple[float, float]]) -> None:
        """A Bezier curve from where the pen is; the last control is its end."""
        made: list[tuple[float, float]] = [
            (x, y) for x, y in (_BERNSTEIN[len(controls)] @ [self.at, *controls]).tolist()
        ]
        if not self.points:
            self.points = [self.at]
        self.points += made
        self.at = made[-1]

    def lift(self, closed: bool) -> None:
        if len(self.points) > 1:
            self.done.append((np.array(self.points), closed))
        if closed:
            self.at = self.start
        self.points = []

    def mirrored(self, kinds: str) -> tuple[float, float]:
        kind, (x, y) = self.last
        return (2 * self.at[0] - x, 2 * self.at[1] - y) if kind and kind in kinds else self.at


def _path(text: str) -> list[Subpath]:
    pen = _Pen()
    for letter, given in path_commands(text):
        kind, (x0, y0) = letter.upper(), pen.at if letter.islower() else (0.0, 0.0)
        control: tuple[str, tuple[float, float]] = ("", (0.0, 0.0))
        if kind == "Z":
            pen.lift(True)
        elif kind == "H":
            pen.line((x0 + given[0], pen.at[1]))
        elif kind == "V":
            pen.line((pen.at[0], y0 + given[0]))
        elif kind == "A":
            _arc(pen, given[:5], (x0 + given[5], y0 + given[6]))
        else:
            points = [(x0 + a, y0 + b) for a, b in zip(given[::2], given[1::2], strict=True)]
            if kind in "ST":
                points = [pen.mirrored("CS" if kind == "S" else "QT"), *points]
            if kind == "M":
                pen.begin(points[0])
            elif kind == "L":
                pen.line(points[0])
            else:
                control = (kind, points[-2])
                pen.curve(points)
        pen.last = control
    pen.lift(False)
    return pen.done


def _arc(pen: _Pen, given: Sequence[float], to: tuple[float, float]) -> None:
    """An elliptical arc by its end points, as the appendix of SVG 1.1 (F.6) turns it into centre and angles."""
    rx, ry, turn, large, sweep = abs(given[0]), abs(given[1]), math.radians(given[2]), given[3], given[4]
    (x1, y1), (x2, y2) = pen.at, to
    if not rx or not ry or pen.at == to:
        pen.line(to)
        return
    c, s = math.cos(turn), math.sin(turn)
    dx, dy = (x1 - x2) / 2, (y1 - y2) / 2
    x, y = c * dx + s * dy, -s * dx + c * dy
    over = (x / rx) ** 2 + (y / ry) ** 2
    if over > 1:
        rx, ry = rx * math.sqrt(over), ry * math.sqrt(over)
    under = (rx * y) ** 2 + (ry * x) ** 2
    factor = math.sqrt(max((rx * ry) ** 2 - under, 0.0) / under) * (-1 if bool(large) == bool(sweep) else 1)
    mx, my = factor * rx * y / ry, -factor * ry * x / rx
    cx, cy = c * mx - s * my + (x1 + x2) / 2, s * mx + c * my + (y1 + y2) / 2
    start = math.atan2((y - my) / ry, (x - mx) / rx)
    end = math.atan2((-y - my) / ry, (-x - mx) / rx)
    if sweep and end < start:
        end += 2 * math.pi
    if not sweep and end > start:
        end -= 2 * math.pi
    for angle in np.linspace(start, end, _PIECES + 1)[1:-1]:
        a, b = rx * math.cos(angle), ry * math.sin(angle)
        pen.line((cx + c * a - s * b, cy + s * a + c * b))
    pen.line(to)


# --- strokes -----------------------------------------------------------------------------------------


def stroke(subpaths: Sequence[Subpath], width: float, cap: str, join: str, limit: float) -> list[Array]:
    """Polygons whose union (non-zero, all turned the same way) is the stroke."""
    half = width / 2
    made: list[Array] = []
    for points, closed in subpaths:
        keep = np.r_[True, np.any(np.diff(points, axis=0) != 0, axis=1)]
        points = points[keep]
        if closed and len(points) > 1 and np.array_equal(points[0], points[-1]):
            points = points[:-1]
        if len(points) < 2:
            continue
        ends = np.roll(points, -1, 0) if closed else points[1:]
        starts = points if closed else points[:-1]
        along = (ends - starts) / np.linalg.norm(ends - starts, axis=1, keepdims=True)
        side = half * np.stack([-along[:, 1], along[:, 0]], 1)
        if not closed and cap == "square":
            starts, ends = starts.copy(), ends.copy()
            starts[0] -= half * along[0]
            ends[-1] += half * along[-1]
        made += [np.stack([a + n, b + n, b - n, a - n]) for a, b, n in zip(starts, ends, side, strict=True)]
        count = len(along)
        for at in range(count if closed else count - 1):
            made += _join(
                ends[at] if closed or at < count - 1 else points[-1],
                along[at],
                along[(at + 1) % count],
                half,
                join,
                limit,
            )
        if not closed and cap == "round":
            made += [_disc(points[0], half), _disc(points[-1], half)]
    return [_turned(polygon) for polygon in made]


def _join(at: Array, before: Array, behind: Array, half: float, join: str, limit: float) -> list[Array]:
    cross = float(before[0] * behind[1] - before[1] * behind[0])
    cosine = float(before @ behind)
    if join == "round":
        return [_disc(at, half)]
    if abs(cross) < 1e-12:
        return []
    sign = -1.0 if cross > 0 else 1.0  # the outer side
    a, b = (at + sign * half * np.array([-d[1], d[0]]) for d in (before, behind))
    if join != "bevel" and 2 / max(1 + cosine, 1e-12) <= limit * limit:
        middle = (a + b) / 2 - at
        tip = at + middle * (half * half / float(middle @ middle))
        return [np.stack([at, a, tip, b])]
    return [np.stack([at, a, b])]


def _turned(polygon: Array) -> Array:
    x, y = polygon[:, 0], polygon[:, 1]
    area = float(x @ np.roll(y, -1) - y @ np.roll(x, -1))
    return polygon if area >= 0 else polygon[::-1]
