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
from weightsmith.study.svg.geometry import Array, apply, outline, stroke, transform
from weightsmith.study.svg.parse import Element, numbers, parse

__all__ = ["Picture", "mse", "render"]

SAMPLES = 4
SHAPES = frozenset({"rect", "circle", "ellipse", "line", "polyline", "polygon", "path"})
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
    side: int
    pixels: Array
    unsupported: dict[str, None] = field(default_factory=dict)


def render(svg: str | Element, size: int = 72) -> Picture:
    """Draw into a square of `size` pixels; the picture keeps its proportions, in the middle, as viewers show it.

    Raises parse.Refused for a text that is not read.
    """
    root = svg if isinstance(svg, Element) else parse(svg)
    side = SAMPLES * size
    canvas = _Canvas(side, np.ones((side, side, 3)))
    _group(canvas, root, _view(root, side), _DEFAULTS, 1.0, top=True)
    coarse = canvas.pixels.reshape(size, SAMPLES, size, SAMPLES, 3).mean((1, 3))
    return Picture(coarse, tuple(canvas.unsupported))


def mse(a: Array, b: Array) -> float:
    """Mean squared error of two pictures."""
    return float(((a - b) ** 2).mean())


def _view(root: Element, side: int) -> Array:
    """User units to samples.  Without a viewBox: width and height, else 100 by 100 (a choice of ours)."""
    box = numbers(root.attributes.get("viewBox", ""))
    if len(box) != 4 or box[2] <= 0 or box[3] <= 0:
        sizes = [next(iter(numbers(root.attributes.get(name, ""))), 0.0) for name in ("width", "height")]
        sizes = [0.0 if "%" in root.attributes.get(name, "") else v
                 for name, v in zip(("width", "height"), sizes, strict=True)]  # fmt: skip
        box = [0.0, 0.0, sizes[0] if sizes[0] > 0 else 100.0, sizes[1] if sizes[1] > 0 else 100.0]
    x, y, w, h = box
    made = np.eye(3)
    if root.attributes.get("preserveAspectRatio", "").strip() == "none":
        made[0, 0], made[1, 1] = side / w, side / h
        made[:2, 2] = -x * side / w, -y * side / h
        return made
    scale = side / max(w, h)
    made[0, 0] = made[1, 1] = scale
    made[:2, 2] = (side - scale * w) / 2 - scale * x, (side - scale * h) / 2 - scale * y
    return made


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
    """Fill the samples whose centre is inside, row by row: crossings of the edges, sorted, with their directions."""
    side = canvas.side
    edges = [np.concatenate([p, np.roll(p, -1, 0)], 1) for p in polygons if len(p) > 1]
    if not edges:
        return
    x0, y0, x1, y1 = np.concatenate(edges).T
    slanted = (y0 != y1) & np.isfinite(x0 + y0 + x1 + y1)
    x0, y0, x1, y1 = (v[slanted] for v in (x0, y0, x1, y1))
    if not len(x0):
        return
    low, high = np.minimum(y0, y1), np.maximum(y0, y1)
    first, last = max(math.floor(low.min() - 0.5), 0), min(math.ceil(high.max() + 0.5), side)
    slope, way = (x1 - x0) / (y1 - y0), np.where(y1 > y0, 1, -1)
    inside = np.zeros((max(last - first, 0), side), bool)
    for row in range(first, last):
        y = row + 0.5
        hit = (low <= y) & (y < high)
        if not hit.any():
            continue
        x = x0[hit] + (y - y0[hit]) * slope[hit]
        order = np.argsort(x, kind="stable")
        winding = np.cumsum(way[hit][order])
        filled = (np.arange(1, len(winding) + 1) % 2 == 1) if even_odd else winding != 0
        columns = np.clip(np.ceil(x[order] - 0.5), 0, side).astype(int)
        for at in np.flatnonzero(filled[:-1]):
            inside[row - first, columns[at] : columns[at + 1]] = True
    target = canvas.pixels[first:last]
    r, g, b, alpha = paint
    target[inside] = (1 - alpha) * target[inside] + alpha * np.array([r, g, b])
