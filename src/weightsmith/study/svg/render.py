"""Draw the subset: basic shapes and paths with fill, stroke, opacity, transform and viewBox, over white.

Four by four samples per pixel.  What is not drawn (text, gradients, clips, filters, use) is named, and counted apart:
it is no mistake of the model that wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from weightsmith.study.svg.colours import Colour, colour
from weightsmith.study.svg.geometry import ROUND, Array, apply, outline, stroke, transform
from weightsmith.study.svg.parse import Element, Refused, numbers, parse

__all__ = ["Picture", "mse", "render"]

SAMPLES = 4
MOST = 500
"""How often the shapes of a picture may cover it: about a second at 72 pixels."""
SHAPES = frozenset({"rect", "circle", "ellipse", "line", "polyline", "polygon", "path"})
_POINT, _CROSSING = 100, 4  # samples that could be filled while a stroke's point is made, a row's crossing sorted
_SILENT = frozenset({"title", "desc", "metadata", "defs", "style"})
_INHERITED = ("fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "stroke-miterlimit", "fill-rule",
              "fill-opacity", "stroke-opacity", "visibility")  # fmt: skip
_DEFAULTS = {"fill": "black", "stroke": "none", "stroke-width": "1", "stroke-linecap": "butt",
             "stroke-linejoin": "miter", "stroke-miterlimit": "4", "fill-rule": "nonzero"}  # fmt: skip
_UNKNOWN = ("clip-path", "mask", "filter", "stroke-dasharray", "marker-end", "marker-start", "marker-mid")


@dataclass(frozen=True)
class Picture:
    """pixels: [size, size, 3] in [0, 1], over white; unsupported: what was left out, each named once."""

    pixels: Array
    unsupported: tuple[str, ...] = ()


@dataclass
class _Canvas:
    """planes: [red, green and blue, rows, columns]; covered: rows from, to, columns from, to."""

    planes: Array
    covered: tuple[int, int, int, int]
    unsupported: dict[str, None] = field(default_factory=dict)
    work: int = 0

    def worked(self, samples: int) -> None:
        """Count what was drawn, in samples; Refused where a picture takes too long."""
        self.work += samples
        if self.work > MOST * self.planes[0].size:
            raise Refused(f"takes as long to draw as {MOST} shapes that cover it")


def render(svg: str | Element, size: int = 72) -> Picture:
    """Draw into a square of `size` pixels; the picture keeps its proportions, in the middle, as viewers show it.

    Raises parse.Refused for a text that is not read.
    """
    root = svg if isinstance(svg, Element) else parse(svg)
    side = SAMPLES * size
    matrix, covered = _view(root, side)
    canvas = _Canvas(np.ones((3, side, side)), covered)
    _group(canvas, root, matrix, _DEFAULTS, 1.0, top=True)
    coarse = canvas.planes.reshape(3, size, SAMPLES, size, SAMPLES).mean((2, 4))
    return Picture(np.moveaxis(coarse, 0, -1), tuple(canvas.unsupported))


def mse(a: Array, b: Array) -> float:
    """Mean squared error of two pictures."""
    return float(((a - b) ** 2).mean())


def _view(root: Element, side: int) -> tuple[Array, tuple[int, int, int, int]]:
    """User units to samples, and the samples that the picture covers: rows from, to, columns from, to.

    The picture is as large as width and height say, else as its viewBox, else 100 by 100 (a choice of ours); what lies
    outside of it is cut off.
    """
    box = numbers(root.attributes.get("viewBox", ""))
    has_box = len(box) == 4 and box[2] > 0 and box[3] > 0
    told = [next((v for v in numbers(text) if v > 0 and "%" not in text), 0.0)
            for text in (root.attributes.get("width", ""), root.attributes.get("height", ""))]  # fmt: skip
    x, y, w, h = box if has_box else (0.0, 0.0, told[0] or 100.0, told[1] or 100.0)
    wide, high = told[0] or (told[1] * w / h if told[1] else w), told[1] or (told[0] * h / w if told[0] else h)
    unit = side / max(wide, high)
    left, top = (side - unit * wide) / 2, (side - unit * high) / 2
    made = np.eye(3)
    fit = root.attributes.get("preserveAspectRatio", "").strip()
    across, down = unit * wide / w, unit * high / h
    if not fit.startswith("none"):
        across = down = max(across, down) if fit.endswith("slice") else min(across, down)
    made[0, 0], made[1, 1] = across, down
    place = {"Min": 0.0, "Max": 1.0}
    made[0, 2] = left + place.get(fit[1:4], 0.5) * (unit * wide - across * w) - across * x
    made[1, 2] = top + place.get(fit[5:8], 0.5) * (unit * high - down * h) - down * y
    rows, columns = (_centres(start, start + unit * size, side) for start, size in ((top, high), (left, wide)))
    return made, (*rows, *columns)


def _centres(start: float, end: float, side: int) -> tuple[int, int]:
    """The samples whose centres lie from start up to end."""
    first, last = (min(max(math.ceil(at - 0.5), 0), side) for at in (start, end))
    return first, last


def _group(
    canvas: _Canvas, element: Element, matrix: Array, style: Mapping[str, str], opacity: float, top: bool = False
) -> None:
    """Draw an element and those inside.  A group's opacity is given to each of its shapes."""
    own = {**style, **{name: element.attributes[name] for name in _INHERITED if name in element.attributes}}
    if element.attributes.get("display") == "none":
        return
    try:
        if "transform" in element.attributes:
            matrix = matrix @ transform(element.attributes["transform"])
    except ValueError as error:
        canvas.unsupported[str(error)] = None
    for name in _UNKNOWN:
        if element.attributes.get(name, "none") != "none":
            canvas.unsupported[name] = None
    opacity *= _share(element.attributes.get("opacity", "1"))
    if element.name in SHAPES:
        if own.get("visibility", "visible") == "visible":
            _shape(canvas, element, matrix, own, opacity)
    elif element.name in ("g", "a") or (element.name == "svg" and top):
        for child in element.children:
            _group(canvas, child, matrix, own, opacity)
    elif element.name not in _SILENT or element.name == "style":
        canvas.unsupported[element.name] = None


def _shape(canvas: _Canvas, element: Element, matrix: Array, style: Mapping[str, str], opacity: float) -> None:
    paths = outline(element)
    fill = _paint(canvas, style["fill"], opacity * _share(style.get("fill-opacity", "1")))
    if fill is not None and element.name != "line":
        _fill(canvas, [apply(matrix, points) for points, _ in paths], style["fill-rule"] == "evenodd", fill)
    edge = _paint(canvas, style["stroke"], opacity * _share(style.get("stroke-opacity", "1")))
    width = next(iter(numbers(style["stroke-width"])), 1.0)
    if edge is not None and width > 0:
        limit = next(iter(numbers(style["stroke-miterlimit"])), 4.0)
        each = ROUND + 4 if "round" in (style["stroke-linejoin"], style["stroke-linecap"]) else 8
        canvas.worked(_POINT * each * sum(len(points) for points, _ in paths))
        pieces = stroke(paths, width, style["stroke-linecap"], style["stroke-linejoin"], limit)
        flipped = np.linalg.det(matrix[:2, :2]) < 0  # all pieces turn the same way, before and after
        _fill(canvas, [apply(matrix, p)[::-1] if flipped else apply(matrix, p) for p in pieces], False, edge)


def _paint(canvas: _Canvas, text: str, opacity: float) -> Colour | None:
    try:
        found = colour(text)
    except ValueError:
        canvas.unsupported["paint" if "url(" in text else f"colour {text[:20]}"] = None
        return None
    return None if found is None else (*found[:3], found[3] * opacity)


def _share(text: str) -> float:
    found = next(iter(numbers(text)), 1.0)
    return min(max(found / 100 if text.strip().endswith("%") else found, 0.0), 1.0)


def _fill(canvas: _Canvas, polygons: Sequence[Array], even_odd: bool, paint: Colour) -> None:
    """Fill the samples whose centre is inside: crossings of edges and rows, sorted, with their directions."""
    above, below, west, east = canvas.covered
    edges = [np.concatenate([p, np.roll(p, -1, 0)], 1) for p in polygons if len(p) > 1 and np.isfinite(p).all()]
    if not edges:
        return
    x0, y0, x1, y1 = np.concatenate(edges).T
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    # The centres of rows from `first` up to `last`, the latter not counted, lie between an edge's ends.
    first, last = (np.clip(np.ceil(v - 0.5), above, below).astype(int) for v in (low, high))
    count = last - first
    top, bottom = int(first.min()), int(last.max())
    left, right = int(np.clip(x0.min(), west, east)), math.ceil(np.clip(x0.max(), west, east))
    canvas.worked(_CROSSING * int(count.sum()) + (bottom - top) * (right - left))
    if not count.any() or left >= right:
        return
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    order = np.lexsort((x, row))
    row, column = row[order] - top, np.clip(np.ceil(x[order] - 0.5), left, right).astype(int) - left
    # Outlines are closed: in every row as many edges go up as down, so that one sum over all rows does.
    winding = np.cumsum(np.where(y1 > y0, 1, -1)[edge][order])
    begins = np.flatnonzero((np.arange(len(winding)) % 2 == 0) if even_odd else winding != 0)
    change = np.zeros((bottom - top, right - left + 1), np.int32)
    np.add.at(change, (row[begins], column[begins]), 1)
    np.add.at(change, (row[begins + 1], column[begins + 1]), -1)
    inside = np.cumsum(change[:, :-1], 1) > 0
    for plane, value in zip(canvas.planes[:, top:bottom, left:right], paint[:3], strict=True):
        alpha = paint[3]
        np.copyto(plane, value if alpha == 1 else (1 - alpha) * plane + alpha * value, where=inside)
