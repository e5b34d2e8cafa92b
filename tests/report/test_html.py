"""The HTML page stands alone: one file, nothing loaded from elsewhere, nothing that a text in it can break."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from weightsmith.report.figures import (
    BLUE,
    BOTH,
    RED,
    Bars,
    Curve,
    Curves,
    Heat,
    LabelledBar,
    Points,
    figure,
)
from weightsmith.report.html import Text, page
from weightsmith.report.table import Column, Table, html

BARS = Bars("Bars", [LabelledBar("</script><b>", 3.0, "3"), LabelledBar("less", -1.0, "−1", spread=0.5)], "n")
HEAT = Heat("Heat", ["a", "b"], ["x", "y"], [[0.0, 1.0], [None, 0.5]], [["0", "1"], ["", "½"]], BOTH, (0, 1))
POINTS = Points("Points", [("one", 0.1, 2.0), ("two", 10.0, 3.0), ("<i>", 10.0, 3.0)], "seconds", "score")
CURVES = Curves("Curves", [Curve("math", [0, 1], [1, 0]), Curve("<u>", [0, 1], [1, 1])], "place", "size")
FIGURES = [BARS, HEAT, POINTS, CURVES]
TABLE = Table("T", (Column("x", "x"),), [{"x": 1.0}])


class Elements(HTMLParser):
    """Collects elements with their attributes, and complains about ends without a start."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed() -> None:
    elements = Elements(page("Title", [Text("One", ("words",)), TABLE, *FIGURES]))
    assert elements.open == []
    tags = [tag for tag, _ in elements.found]
    assert not {"link", "iframe", "img", "object", "script"} & set(tags)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)


def test_the_style_loads_nothing() -> None:
    style = re.search(r"<style>(.*?)</style>", page("T", []), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]


def test_a_page_is_small() -> None:
    assert len(page("T", [Text("a", ("b",)), TABLE, *FIGURES])) < 20_000


def test_texts_are_escaped() -> None:
    text = page("<i>", [Text("<u>", ("<script>",)), *FIGURES])
    for tag in ("<u>", "<script", "</script"):
        assert tag not in text
    assert "<i>" not in text.replace('<i class="', "")


def styles(text: str, kind: str) -> list[dict[str, str]]:
    found = re.findall(rf'<i class="{kind}" style="([^"]*)"', text)
    return [dict(part.split(":", 1) for part in style.split(";") if part) for style in found]


def test_bars_begin_at_zero() -> None:
    """From -1.5 (the end of a whisker) to 3."""
    bars, (whisker,) = styles(figure(BARS), "bar"), styles(figure(BARS), "whisker")
    assert [float(bar["left"][:-1]) for bar in bars] == pytest.approx([100 / 3, 100 / 9], abs=0.01)
    assert [float(bar["width"][:-1]) for bar in bars] == pytest.approx([200 / 3, 200 / 9], abs=0.01)
    assert (float(whisker["left"][:-1]), float(whisker["width"][:-1])) == pytest.approx((0, 200 / 9), abs=0.01)


def test_a_heat_map_is_coloured_by_its_span() -> None:
    cells = re.findall(r"<td ([^>]*)>(.*?)</td>", figure(HEAT))
    assert [text for _, text in cells] == ["0", "1", "", "½"]
    colours = [found[1] if (found := re.search(r"background:(\S+)\"", style)) else "" for style, _ in cells]
    assert colours == ["rgba(196,87,59,0.73)", "rgba(59,130,196,0.73)", "", "rgba(196,87,59,0.03)"]


@pytest.mark.parametrize(("colours", "ink"), [(BLUE, "59,130,196"), (RED, "196,87,59")])
def test_a_heat_map_of_one_colour(colours: str, ink: str) -> None:
    text = figure(replace(HEAT, colours=colours))
    assert [f"rgba({ink},{depth})" in text for depth in ("0.05", "0.80", "0.42")] == [True] * 3


def test_a_curve_of_one_point_is_seen_and_nothing_below_0_is_cut_off() -> None:
    drawn = figure(Curves("c", [Curve("one", [1], [0.5]), Curve("low", [0, 1], [-1.0, 0.5])], "x", "y"))
    wide = drawn[: drawn.index("slim")]
    assert wide.count("<circle") == 3
    height = float(re.findall(r'viewBox="0 0 \d+ (\d+)"', wide)[0])
    assert all(0 < float(at) < height for at in re.findall(r'cy="([-\d.]+)"', wide))
    many = figure(Curves("c", [Curve("many", list(range(99)), list(range(99)))], "x", "y"))
    assert "<circle" not in many


def test_long_texts_are_broken_into_lines() -> None:
    text = html(Table("t", (Column("a", "a"), Column("b", "b")), [{"a": "short", "b": "word " * 20}]))
    assert '<td class="long">' in text
    assert "<td>short</td>" in text


def test_points_and_curves_are_drawn_for_two_widths_and_stay_inside() -> None:
    for drawn in (POINTS, CURVES):
        text = figure(drawn)
        for kind, width in (("wide", 1160), ("slim", 360)):
            part = re.search(rf'<div class="{kind}"><svg viewBox="0 0 (\d+) (\d+)".*?</svg>', text)
            assert part is not None
            assert int(part[1]) == width
            places = [float(x) for x in re.findall(r'(?:cx|x1|x2)="([\d.-]+)"', part[0])]
            assert all(0 <= x <= width for x in places)
            labels = [
                (float(x), t) for x, t in re.findall(r'<text class="tag" x="([\d.-]+)"[^>]*>(.*?)</text>', part[0])
            ]
            assert all(
                x >= 0 and x + 6.3 * len(t.replace("&lt;", "<").replace("&gt;", ">")) <= width for x, t in labels
            )


def test_points_of_one_place_do_not_write_over_each_other() -> None:
    text = figure(POINTS).split('<div class="slim">')[0]
    assert text.count("<circle") == 3
    boxes = [(float(x), float(y)) for x, y in re.findall(r'<text class="tag" x="([\d.-]+)" y="([\d.-]+)"', text)]
    assert len(set(boxes)) == len(boxes) == 3
    crowd = Points("Crowd", [(f"a rather long name {i}", 1.0, 1.0) for i in range(9)], "x", "y")
    assert 1 <= figure(crowd).split('<div class="slim">')[0].count('class="tag"') <= 4, "the others by a pointer"


@pytest.mark.parametrize("drawn", [replace(POINTS, points=[]), replace(POINTS, points=POINTS.points[:1])])
def test_few_points(drawn: Points) -> None:
    assert figure(drawn).count("<circle") == 2 * len(drawn.points)


@pytest.mark.parametrize("low", [100.02, 1e-3, 2.5, 1200.0])
@pytest.mark.parametrize("span", [0.26, 3.0, 500.0])
def test_numbers_beside_an_axis_differ(low: float, span: float) -> None:
    drawn = Points("P", [("a", 0.041, low), ("b", 0.048, low + span)], "x", "y")
    for part in figure(drawn).split('<div class="slim">'):
        for place in ("end", "middle"):
            found = re.findall(rf'<text x="[^"]*" y="[^"]*" text-anchor="{place}">([^<]*)</text>', part)
            assert len(set(found)) == len(found) >= 2, found


def test_the_name_of_an_axis_stands_beside_its_numbers() -> None:
    """Digits of 12 px are 7 px wide; a line turned by 90 degrees reaches 3 px beyond its place."""
    drawn = Points("P", [("a", 0.041, 99.6), ("b", 0.048, 100.4)], "x", "y")
    for part in figure(drawn).split('<div class="slim">'):
        numbers = re.findall(r'<text x="([^"]*)" y="[^"]*" text-anchor="end">([^<]*)</text>', part)
        (name,) = re.findall(r"rotate\(-90 (\d+) ", part)
        assert int(name) + 3 <= min(float(x) - 7 * len(text) for x, text in numbers)


def test_the_ends_of_a_scale_are_told_apart() -> None:
    values = [[415.77, 416.31]]
    drawn = figure(Heat("perplexity", ["0.2"], ["0.5", "1"], values, [["415.77", "416.31"]], BLUE, (415.77, 416.31)))
    assert '<p class="axis">415.8 <i' in drawn
    assert "416.3</p>" in drawn
