"""Seeded scenes of 1 to 8 shapes, edits with known answers, questions, and captions.

A scene is drawn from a seed and an index alone, so that every model sees the same.  The prompt never holds the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

__all__ = [
    "COLOURS",
    "INVARIANT",
    "KINDS",
    "OPERATIONS",
    "Case",
    "Scene",
    "Shape",
    "caption",
    "edit",
    "moved",
    "question",
    "scene",
]

SIDE = 100
COLOURS = ("red", "blue", "green", "orange", "purple", "black")
KINDS = ("circle", "rect", "triangle")
_WORDS = {"circle": "circle", "rect": "rectangle", "triangle": "triangle"}


@dataclass(frozen=True)
class Shape:
    """A shape in a square of 100: its kind, colour, centre and half size."""

    name: str
    kind: str
    colour: str
    x: int
    y: int
    half: int
    stroke: str = ""
    opacity: float = 1.0

    def svg(self) -> str:
        more = f' stroke="{self.stroke}" stroke-width="3"' if self.stroke else ""
        more += f' opacity="{self.opacity:g}"' if self.opacity != 1 else ""
        x, y, r = self.x, self.y, self.half
        if self.kind == "circle":
            body = f'circle id="{self.name}" cx="{x}" cy="{y}" r="{r}"'
        elif self.kind == "rect":
            body = f'rect id="{self.name}" x="{x - r}" y="{y - r}" width="{2 * r}" height="{2 * r}"'
        else:
            body = f'polygon id="{self.name}" points="{x},{y - r} {x + r},{y + r} {x - r},{y + r}"'
        return f'<{body} fill="{self.colour}"{more}/>'


@dataclass(frozen=True)
class Scene:
    """Shapes, later ones on top."""

    shapes: tuple[Shape, ...]

    def svg(self, box: str = f"0 0 {SIDE} {SIDE}", transform: str = "") -> str:
        body = "".join(shape.svg() for shape in self.shapes)
        inner = f'<g transform="{transform}">{body}</g>' if transform else body
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{inner}</svg>'


@dataclass(frozen=True)
class Case:
    """One example: what is asked, and the right answer (an SVG, or a choice)."""

    svg: str
    instruction: str
    answer: str
    operation: str
    choices: tuple[str, ...] = ()
    words: tuple[tuple[str, str, int], ...] = ()


def _drawn(seed: int, index: int, what: str) -> random.Random:
    return random.Random(f"{what} {seed} {index}")


def scene(seed: int, index: int, most: int = 8) -> Scene:
    """The scene of an index: 1 to `most` shapes."""
    draw = _drawn(seed, index, "scene")
    return Scene(
        tuple(
            Shape(
                f"s{at + 1}",
                draw.choice(KINDS),
                draw.choice(COLOURS),
                draw.randint(20, 80),
                draw.randint(20, 80),
                draw.randint(6, 18),
            )
            for at in range(draw.randint(1, most))
        )
    )


# --- editing -----------------------------------------------------------------------------------------


def _changed(given: Scene, name: str, **values: object) -> str:
    return Scene(tuple(replace(s, **values) if s.name == name else s for s in given.shapes)).svg()  # type: ignore[arg-type]


def _colour(given: Scene, draw: random.Random) -> tuple[str, str, str]:
    shape = draw.choice(given.shapes)
    new = draw.choice([c for c in COLOURS if c != shape.colour])
    return given.svg(), f"Change the colour of {shape.name} to {new}.", _changed(given, shape.name, colour=new)


def _contour(given: Scene, draw: random.Random) -> tuple[str, str, str]:
    shape, line = draw.choice(given.shapes), draw.choice(COLOURS)
    return (
        given.svg(),
        f"Give {shape.name} a {line} outline of width 3.",
        _changed(given, shape.name, stroke=line),
    )


def _compressed(given: Scene, draw: random.Random) -> tuple[str, str, str]:
    long = given.svg().replace('viewBox="', 'version="1.1" viewBox="').replace("<circle ", '<circle  stroke="none" ')
    long = long.replace("/>", ' fill-opacity="1"  />\n  ')
    return long, "Make the SVG shorter without changing how it looks.", given.svg()


def _upside_down(given: Scene, draw: random.Random) -> tuple[str, str, str]:
    return given.svg(), "Turn the picture upside down.", given.svg(transform=f"scale(1,-1) translate(0,-{SIDE})")


def _transparent(given: Scene, draw: random.Random) -> tuple[str, str, str]:
    shape = draw.choice(given.shapes)
    return given.svg(), f"Make {shape.name} half transparent.", _changed(given, shape.name, opacity=0.5)


def _cropped(given: Scene, draw: random.Random) -> tuple[str, str, str]:
    side = draw.choice(("left", "right"))
    box = f"{0 if side == 'left' else SIDE // 2} 0 {SIDE // 2} {SIDE}"
    return given.svg(), f"Crop the picture to its {side} half.", given.svg(box=box)


OPERATIONS: Mapping[str, Callable[[Scene, random.Random], tuple[str, str, str]]] = {
    "colour": _colour,
    "contour": _contour,
    "compression": _compressed,
    "upside_down": _upside_down,
    "transparency": _transparent,
    "crop": _cropped,
}


def edit(seed: int, index: int, operation: str) -> Case:
    """A scene, what to do with it, and the SVG that is right."""
    svg, instruction, answer = OPERATIONS[operation](scene(seed, index), _drawn(seed, index, operation))
    return Case(svg, instruction, answer, operation)


# --- understanding -----------------------------------------------------------------------------------

_CLEAR = 6
INVARIANT = {"moved": "translate(3,2)", "turned": "rotate(2 50 50)"}
"""Changes after which every answer stays the same."""


def moved(svg: str, transform: str) -> str:
    """The same picture under a small transform."""
    head, _, rest = svg.partition(">")
    body = rest.removesuffix("</svg>")
    return f'{head}><g transform="{transform}">{body}</g></svg>'


def question(seed: int, index: int) -> Case:
    """A question about a scene with four choices, the right one at a drawn place."""
    draw = _drawn(seed, index, "question")
    given = scene(seed, index, most=6)
    kind = draw.choice(("colour", "category", "count", "position"))
    shape = draw.choice(given.shapes)
    if kind == "position" and min(abs(shape.x - SIDE / 2), abs(shape.y - SIDE / 2)) < _CLEAR:
        kind = "colour"  # too near to a border of two quarters to stay on its side when the picture is moved
    if kind == "colour":
        asked, right, others = f"What colour is {shape.name}?", shape.colour, [c for c in COLOURS if c != shape.colour]
    elif kind == "category":
        names = [*_WORDS.values(), "ellipse", "star"]
        asked, right = f"What is {shape.name}?", _WORDS[shape.kind]
        others = [name for name in names if name != right]
    elif kind == "count":
        count = len(given.shapes)
        asked, right, others = "How many shapes are there?", str(count), [str(n) for n in range(1, 9) if n != count]
    else:
        half = "left" if shape.x < SIDE / 2 else "right"
        place = f"{'upper' if shape.y < SIDE / 2 else 'lower'} {half}"
        asked, right = f"In which quarter is the centre of {shape.name}?", place
        others = [p for p in ("upper left", "upper right", "lower left", "lower right") if p != place]
    choices = draw.sample(others, 3)
    choices.insert(draw.randrange(4), right)
    return Case(given.svg(), asked, right, kind, tuple(choices))


# --- generation --------------------------------------------------------------------------------------


def caption(seed: int, index: int) -> Case:
    """A caption of one or two kinds of shapes with their colours and numbers."""
    draw = _drawn(seed, index, "caption")
    kinds = draw.sample(KINDS, draw.randint(1, 2))
    words = tuple((draw.choice(COLOURS), kind, draw.randint(1, 3)) for kind in kinds)
    said = " and ".join(f"{n} {c} {_WORDS[k]}{'s' if n > 1 else ''}" for c, k, n in words)
    return Case("", f"Draw {said}.", "", "generate", words=words)
