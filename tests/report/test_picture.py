"""The SVG: well-formed, one rectangle per bar at its place, whiskers as long as the spread."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from weightsmith.report.picture import Bar, Panel, bars

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(text: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(text)
    return [dict(found.attrib) for found in root.iter(f"{SVG}rect") if found.attrib["class"] != "page"]


def test_bars_are_drawn_to_scale() -> None:
    panel = Panel("P", [Bar("half", 0.5), Bar("all", 1.0), Bar("worse", -0.4), Bar("joint", 0.9, other=True)])
    half, whole, worse, joint = rectangles(bars([panel], "caption"))
    width = float(whole["width"])
    assert abs(float(half["width"]) - width / 2) < 0.1
    assert abs(float(worse["width"]) - width * 0.4) < 0.1
    assert abs(float(worse["x"]) + float(worse["width"]) - float(whole["x"])) < 0.1  # to the left of zero
    assert [bar["class"] for bar in (half, whole, worse, joint)] == ["bar", "bar", "below", "other"]


def test_a_whisker_is_twice_the_spread() -> None:
    text = bars([Panel("P", [Bar("a", 0.5, 0.1), Bar("b", 1.0)])], "c")
    scale = float(rectangles(text)[1]["width"])
    (whisker,) = re.findall(r'class="whisker" d="M([\d.]+) \d+H([\d.]+)', text)
    assert abs(float(whisker[1]) - float(whisker[0]) - 0.2 * scale) < 0.2


def test_texts_are_escaped_and_numbers_readable() -> None:
    text = bars([Panel("A & B", [Bar("<x>", -0.126)])], 'say "what"')
    words = [found.text for found in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert "A & B" in words
    assert "<x>" in words
    assert "−13%" in words
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_zero_is_always_marked() -> None:
    for worst in (-0.1, -0.3, -0.7, -2.1, -5.5):
        text = bars([Panel("P", [Bar("a", worst), Bar("b", 0.9)])], "c")
        words = [found.text for found in ElementTree.fromstring(text).iter(f"{SVG}text")]
        assert "0%" in words
        assert text.count('class="zero"') == 1
        assert len(re.findall('class="grid"', text)) <= 6
