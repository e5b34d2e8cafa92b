"""SVG: the parser, the renderer against closed forms, seeded scenes, scores."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from weightsmith.study.svg.colours import colour
from weightsmith.study.svg.parse import Refused, extract, path_commands
from weightsmith.study.svg.render import mse, render
from weightsmith.study.svg.scenes import COLOURS, INVARIANT, OPERATIONS, caption, edit, moved, question, scene
from weightsmith.study.svg.score import edited, generated, letter_of


def ink(body: str, size: int = 100, head: str = 'viewBox="0 0 100 100"') -> float:
    """Area in user units that is black, of a picture of 100 by 100."""
    pixels = render(f'<svg xmlns="http://www.w3.org/2000/svg" {head}>{body}</svg>', size).pixels
    return float((1 - pixels[:, :, 0]).sum() * (100 / size) ** 2)


# --- areas in closed form ----------------------------------------------------------------------------

AREAS = [
    ('<rect x="10" y="20" width="30" height="40"/>', 1200),
    ('<rect x="10" y="20" width="30" height="40" rx="5"/>', 1200 - (4 - math.pi) * 25),
    ('<circle cx="50" cy="50" r="30"/>', math.pi * 900),
    ('<ellipse cx="50" cy="50" rx="30" ry="10"/>', math.pi * 300),
    ('<polygon points="10,10 90,10 50,90"/>', 3200),
    ('<polyline points="10,10 90,10 50,90"/>', 3200),
    ('<line x1="10" y1="50" x2="90" y2="50" stroke="black" stroke-width="4"/>', 320),
    ('<line x1="10" y1="50" x2="90" y2="50" stroke="black" stroke-width="4" stroke-linecap="square"/>', 336),
    ('<line x1="10" y1="50" x2="90" y2="50" stroke="black" stroke-width="8" stroke-linecap="round"/>', 690.3),
    ('<rect x="20" y="20" width="60" height="60" fill="none" stroke="black" stroke-width="4"/>', 64**2 - 56**2),
    ('<polyline points="20,20 80,20 80,80" fill="none" stroke="black" stroke-width="4"/>', 480),
    ('<path d="M10 10H90V90H10Z"/>', 6400),
    ('<path d="m10 10h80v80h-80z"/>', 6400),
    ('<path d="M10 50A40 40 0 0 1 90 50Z"/>', math.pi * 800),
    ('<path d="M10 50a40 40 0 1 0 80 0z"/>', math.pi * 800),
    ('<path d="M0 0Q50 100 100 0Z"/>', 10000 / 3),
    ('<path d="M0 0C0 100 100 100 100 0Z"/>', 6000),
    ('<path d="M0 0C0 50 25 50 50 50S100 50 100 0Z"/>', 4375),
    ('<path d="M10 10H90V90H10ZM30 30H70V70H30Z"/>', 6400),
    ('<path fill-rule="evenodd" d="M10 10H90V90H10ZM30 30H70V70H30Z"/>', 4800),
    ('<path d="M10 10H90V90H10ZM30 30V70H70V30Z"/>', 4800),
    ('<g transform="translate(10,10) scale(0.5)"><rect width="100" height="100"/></g>', 2500),
    ('<rect x="40" y="10" width="20" height="80" transform="rotate(45 50 50)"/>', 1600),
    ('<rect width="50" height="50" transform="matrix(1 0 0.5 1 0 0)"/>', 2500),
    ('<rect width="50" height="50" opacity="0.5"/>', 1250),
    ('<rect width="50" height="50" fill-opacity="50%"/>', 1250),
    ('<rect width="50" height="50" style="fill:none;stroke:black;stroke-width:2"/>', 51**2 - 48**2),
    ('<g opacity="0"><rect width="50" height="50"/></g>', 0),
    ('<rect width="50" height="50" display="none"/>', 0),
    ('<rect x="-50" y="-50" width="100" height="100"/>', 2500),
    ('<rect width="0" height="50"/><circle r="0"/><path d=""/>', 0),
]  # fmt: skip


@pytest.mark.parametrize(("body", "area"), AREAS, ids=[body[:50] for body, _ in AREAS])
def test_areas(body: str, area: float) -> None:
    assert ink(body) == pytest.approx(area, rel=0.01, abs=10)


def test_the_viewbox_is_kept_in_proportion() -> None:
    tall = '<rect x="-50" width="150" height="100"/>'
    assert ink(tall, head='viewBox="0 0 50 100"') == 5000, "what lies beside the picture is cut off"
    square = 'viewBox="0 0 50 100" width="100" height="100"'
    assert ink('<rect width="50" height="100"/>', head=square) == 5000
    assert ink(tall, head=square) == 10000, "what lies beside the viewBox is still in the picture"
    assert ink('<rect width="50" height="100"/>', head=f'{square} preserveAspectRatio="none"') == 10000
    assert ink(tall, head=f'{square} preserveAspectRatio="xMidYMin slice"') == 10000
    half = render(f'<svg {square} preserveAspectRatio="xMinYMin"><rect width="50" height="100"/></svg>', 10).pixels
    assert (half[:, :5].max(), half[:, 5:].min()) == (0, 1)
    assert ink('<rect width="24px" height="24px"/>', head='width="48px" height="48px"') == pytest.approx(2500)
    assert ink('<rect width="50" height="50"/>', head='width="100%" height="100%"') == pytest.approx(2500)
    assert ink('<rect width="20" height="9"/>', head='viewBox="0 0 20 40" height="80"') == 50 * 22.5


def test_cropping_shows_the_half_and_nothing_of_the_other() -> None:
    case = next(one for at in range(20) if "left" in (one := edit(0, at, "crop")).instruction)
    whole, half = render(case.svg, 100).pixels, render(case.answer, 100).pixels
    assert np.array_equal(half[:, 25:75], whole[:, :50])
    assert half[:, :25].min() == half[:, 75:].min() == 1


def test_later_shapes_cover_and_transparent_paper_is_white() -> None:
    picture = render('<svg viewBox="0 0 10 10"><rect width="10" height="10" fill="red"/>'
                     '<rect width="10" height="10" fill="blue" opacity="0.25"/></svg>', 8).pixels  # fmt: skip
    assert np.allclose(picture, [0.75, 0, 0.25])
    assert np.allclose(render('<svg viewBox="0 0 10 10"/>', 8).pixels, 1)


def test_what_is_not_drawn_is_named() -> None:
    body = '<svg viewBox="0 0 9 9"><text>a</text><rect width="9" height="9" fill="url(#g)" filter="url(#f)"/></svg>'
    assert set(render(body, 8).unsupported) == {"text", "paint", "filter"}
    assert render('<svg viewBox="0 0 9 9"><rect width="9" height="9" fill="vermilion"/></svg>').unsupported


def test_colours() -> None:
    assert colour("#f00") == colour("red") == colour("rgb(255, 0, 0)") == colour("#FF0000") == (1, 0, 0, 1)
    assert colour("rgba(0,0,255,0.5)") == (0, 0, 1, 0.5)
    assert colour("none") is None
    with pytest.raises(ValueError, match="colour 'reddish'"):
        colour("reddish")


# --- hostile texts -----------------------------------------------------------------------------------

BOMB = '<!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{("&" + chr(97 + n) + ";") * 10}">' for n in range(9)
)
HOSTILE = {
    "entities": BOMB + "]><svg>&j;</svg>",
    "outside entity": '<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "outside dtd": '<!DOCTYPE svg SYSTEM "http://example.invalid/x.dtd"><svg/>',
    "script": "<svg><script>1</script></svg>",
    "handler": '<svg onload="x()"/>',
    "link": '<svg xmlns:xlink="http://www.w3.org/1999/xlink"><image xlink:href="http://example.invalid/a.png"/></svg>',
    "url": '<svg><rect style="fill:url(http://example.invalid/a.svg#b)"/></svg>',
    "import": '<svg><rect style="@import x"/></svg>',
    "foreign": "<svg><foreignObject/></svg>",
    "instruction": '<?xml-stylesheet href="a.css"?><svg/>',
    "deep": "<svg>" + "<g>" * 100_000,
    "many": "<svg>" + "<g/>" * 100_000 + "</svg>",
    "long": "<svg>" + " " * (2 << 20) + "</svg>",
    "path": f'<svg><path d="{"M0 0" * 30_000}"/></svg>',
    "shapes": '<svg viewBox="0 0 9 9">' + '<rect width="9" height="9"/>' * 5_000 + "</svg>",
    "curves": '<svg><path stroke="red" stroke-linejoin="round" d="M0 0' + "c1 9 3 1 0 0" * 5_000 + '"/></svg>',
    "broken": "<svg><g></svg>",
    "no svg": "<html/>",
    "empty": "",
    "zero byte": "<svg>\0</svg>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused_at_once(name: str) -> None:
    began = time.process_time()
    with pytest.raises(Refused):
        render(HOSTILE[name])
    assert time.process_time() - began < 1


def test_no_text_takes_the_square_of_its_length() -> None:
    long = 500_000
    began = time.process_time()
    for word in ("a" * long, "a(" * (long // 2), "a" + " " * long):
        assert render(f'<svg viewBox="0 0 9 9"><g transform="{word}"/></svg>', 8).pixels.min() == 1
    for text in ("```svg" + "\n" * long, "```svg" + " " * long, "<svg " + "</svg " * (long // 6)):
        assert extract(text) is None
    assert time.process_time() - began < 1


def test_odd_but_harmless_texts_are_drawn() -> None:
    for body in ('<rect width="1e400" height="9"/>', '<path d="M0 0L"/>', '<path d="L5 5 9 9"/>', '<circle r="x"/>',
                 '<rect transform="wobble(3)" width="9" height="9"/>', '<use href="#a"/>', '<polygon points="1"/>',
                 '<path d="M0 0A0 0 0 0 1 9 9"/>', '<line x1="5" y1="5" x2="5" y2="5" stroke="red"/>'):  # fmt: skip
        assert np.isfinite(render(f'<svg viewBox="0 0 9 9">{body}</svg>', 8).pixels).all()


def test_paths_are_read_as_written() -> None:
    wanted = [("M", [1.0, -2.5]), ("L", [3.0, 4.0]), ("L", [5.0, 6.0]), ("z", [])]
    assert path_commands("M1-2.5L3,4 5 6z") == wanted
    assert path_commands("M0 0 1 1") == [("M", [0.0, 0.0]), ("L", [1.0, 1.0])]
    assert path_commands("m0 0a1 1 0 01 2 3") == [("m", [0.0, 0.0]), ("a", [1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0])]
    assert path_commands("M0 0L1") == [("M", [0.0, 0.0])]


def test_extraction() -> None:
    assert extract("Here:\n```svg\n<svg>a</svg>\n```\nand <svg>b</svg>") == "<svg>a</svg>"
    assert extract("so <svg>b</svg> and <svg>c</svg>") == "<svg>b</svg>"
    assert extract("<svg>never ends") is None
    assert extract("no picture") is None
    began = time.perf_counter()
    extract("<svg" * 1_000_000)
    assert time.perf_counter() - began < 1


# --- scenes and scores -------------------------------------------------------------------------------


def test_scenes_come_from_their_seed() -> None:
    assert scene(0, 3) == scene(0, 3) != scene(1, 3)
    assert all(1 <= len(scene(0, at).shapes) <= 8 for at in range(50))
    assert question(0, 5) == question(0, 5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_right_answer_scores_fully_and_nothing_scores_nothing(operation: str) -> None:
    for at in range(5):
        case = edit(0, at, operation)
        right = edited(case, f"```svg\n{case.answer}\n```")
        assert (right.mse, right.valid, right.unchanged, right.unsupported) == (0.0, True, False, 0)
        assert edited(case, "").mse == 1.0
        assert not edited(case, "<svg").valid
        same = edited(case, case.svg)
        assert same.unchanged
        assert same.mse == pytest.approx(mse(render(case.svg).pixels, render(case.answer).pixels))
        assert operation == "compression" or same.mse > 0
        assert case.answer not in case.svg + case.instruction
    if operation == "compression":
        assert right.compression < 1


def test_doing_nothing_by_hand() -> None:
    """A black square on a quarter, to be turned upside down: two quarters differ wholly."""
    from weightsmith.study.svg.scenes import Case

    square = '<svg viewBox="0 0 100 100">{}<rect width="50" height="50"/>{}</svg>'
    case = Case(square.format("", ""), "", square.format('<g transform="scale(1,-1) translate(0,-100)">', "</g>"), "x")
    assert edited(case, case.svg).mse == pytest.approx(0.5)


def test_upside_down_twice_is_the_picture() -> None:
    given = scene(0, 1)
    once = "scale(1,-1) translate(0,-100)"
    twice = moved(given.svg(transform=once), once)
    assert mse(render(twice).pixels, render(given.svg()).pixels) < 1e-12
    assert mse(render(given.svg(transform=once)).pixels, np.flipud(render(given.svg()).pixels)) < 1e-3


def test_questions_have_one_right_answer_that_small_moves_keep() -> None:
    kinds = set()
    for at in range(80):
        case = question(0, at)
        kinds.add(case.operation)
        assert len(set(case.choices)) == 4
        assert case.choices.count(case.answer) == 1
        for change in INVARIANT.values():
            assert not render(moved(case.svg, change)).unsupported
    assert kinds == {"colour", "category", "count", "position"}


def test_captions_are_checked_word_by_word() -> None:
    case = next(caption(0, at) for at in range(99) if len(caption(0, at).words) == 2)
    drawn = ""
    bodies = {"circle": '<circle r="9" fill="{}"/>', "rect": '<rect width="9" height="9" fill="{}"/>',
              "triangle": '<polygon points="0,0 9,0 4,9" fill="{}"/>'}  # fmt: skip
    for shade, kind, count in case.words:
        drawn += bodies[kind].format(shade) * count
    assert generated(case, f"<svg>{drawn}</svg>").rules == 1.0
    assert generated(case, f"<svg>{drawn}{drawn}</svg>").rules == 0.0
    wrong = next(shade for shade in COLOURS if shade != case.words[0][0])
    assert generated(case, f"<svg>{drawn.replace(case.words[0][0], wrong)}</svg>").rules <= 0.5
    assert not generated(case, "<svg><g></svg>").valid
    assert generated(case, "").rules == 0.0


def test_letters() -> None:
    assert letter_of("B. red", 4) == 1
    assert letter_of("The answer is (C)", 4) == 2
    assert letter_of("E", 4) is None
    assert letter_of("a cat", 4) is None
