"""What hands do faster than the server answers: nothing that was typed, chosen or drawn is lost or changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

pytest.importorskip("playwright.sync_api", reason="make setup-studio installs it")

from playwright.sync_api import Page, Route, expect
from studio_kit import until
from test_studio_browser import SECONDS, Server, browser, page, ready, server, state, yaml

__all__ = ["browser", "page", "server", "state"]

RECIPE = """base: models/base
models:
  math: models/math
  code: models/code
method: ties
parameters:
  density: 0.5
"""


def slowly(page: Page, where: str, seconds: float = 0.4) -> None:
    """Let answers take their time."""

    def wait(route: Route) -> None:
        time.sleep(seconds)
        route.continue_()

    page.route(where, wait)


@pytest.fixture
def begun(page: Page, server: Server) -> Page:
    """A recipe of its own, opened."""
    name = f"hands-{len(list(server.folder.glob('hands-*')))}.yaml"
    (server.folder / name).write_text(RECIPE)
    page.goto(f"{server.home}/recipe?path={name}")
    ready(page)
    return page


def half_a_field(page: Page) -> None:
    page.fill("#f-stage-0-density", "0.7")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")


def half_a_text(page: Page) -> None:
    page.fill("#yaml", yaml(page) + "seed: 4\n")
    page.locator("#f-stage-0-weight").focus()


@pytest.mark.parametrize("before", [half_a_field, half_a_text])
def test_an_answer_leaves_a_field_that_is_half_typed(begun: Page, before: Callable[[Page], None]) -> None:
    slowly(begun, "**/recipe/*")
    before(begun)
    begun.keyboard.type("1.25", delay=300)
    expect(begun.locator("#f-stage-0-weight")).to_be_focused()
    expect(begun.locator("#f-stage-0-weight")).to_have_value("1.25")
    begun.keyboard.press("Tab")
    expect(begun.locator("#yaml")).to_have_value(re.compile(r"weight: 1\.25\n"))
    assert re.search(r"density: 0\.7" if before is half_a_field else "seed: 4", yaml(begun))


def test_a_field_and_the_yaml_both_count(begun: Page) -> None:
    slowly(begun, "**/recipe/set")
    begun.fill("#f-stage-0-lambda", "0.9")
    begun.locator("#yaml").focus()
    begun.keyboard.press("Control+End")
    begun.keyboard.type("# a note of mine", delay=60)
    expect(begun.locator("#yaml")).to_have_value(re.compile(r"lambda: 0\.9"))
    assert "\n# a note of mine\n" in yaml(begun)
    assert yaml(begun).startswith(RECIPE)


@pytest.mark.parametrize("button", ["run", "save"])
def test_what_was_typed_last_is_in_what_is_saved_and_merged(begun: Page, server: Server, button: str) -> None:
    slowly(begun, "**/recipe/set")
    begun.fill("#out", f"at-once-{button}")
    begun.fill("#f-stage-0-lambda", "0.33")
    begun.fill("#f-stage-0-weight", "0.25")
    file = server.folder / begun.url.partition("path=")[2]
    begun.click(f"#{button}")
    begun.wait_for_url("**/run/*") if button == "run" else expect(begun.locator("#saved-state")).to_have_text("saved")
    assert "lambda: 0.33\n  weight: 0.25\n" in file.read_text()


def test_a_point_is_moved_and_merged_at_once(begun: Page, server: Server) -> None:
    begun.locator('[data-ramp=\'["stage", 0, "density"]\']').click()
    begun.locator(".ramp circle").nth(2).focus()
    before = yaml(begun)
    begun.keyboard.press("PageUp")
    begun.keyboard.press("PageUp")
    begun.fill("#out", "moved")
    begun.click("#run")
    begun.wait_for_url("**/run/*")
    begun.go_back()
    assert yaml(begun) != before
    assert re.search(r"density: \[0\.5, 0\.5, 0\.9, 0\.5, 0\.5\]", yaml(begun))


def test_a_ramp_is_drawn_while_an_answer_comes(begun: Page) -> None:
    begun.locator('[data-ramp=\'["stage", 0, "density"]\']').click()
    svg = begun.locator(".ramp svg")
    svg.evaluate("e => e.scrollIntoView({block: 'center'})")
    slowly(begun, "**/recipe/set")
    changed = "e => { e.value = '0.8'; e.dispatchEvent(new Event('change', {bubbles: true})); }"
    begun.locator("#f-stage-0-lambda").evaluate(changed)
    box = svg.bounding_box()
    assert box
    begun.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.2 * box["height"])
    begun.mouse.down()
    begun.wait_for_timeout(900)
    begun.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.2 * box["height"], steps=5)
    begun.mouse.up()
    expect(begun.locator("#yaml")).to_have_value(re.compile(r"lambda: 0\.8"))
    expect(begun.locator("#yaml")).to_have_value(re.compile(r"density: \[(0\.[89]\d*(, )?){5}\]"))


def test_a_change_leaves_the_page_where_it_is(begun: Page) -> None:
    begun.set_viewport_size({"width": 375, "height": 812})
    begun.locator('[data-ramp=\'["stage", 0, "lambda"]\']').click()
    button = begun.get_by_role("button", name="one for each of 3 blocks")
    button.scroll_into_view_if_needed()
    before = begun.evaluate("scrollY")
    button.click()
    expect(begun.locator(".ramp rect")).to_have_count(3)
    ready(begun)
    assert begun.evaluate("scrollY") == before > 0


def test_a_page_that_is_left_keeps_what_was_typed(begun: Page, server: Server) -> None:
    begun.locator("#yaml").focus()
    begun.keyboard.press("Control+End")
    begun.keyboard.type("seed: 8")
    address = begun.url
    begun.goto(f"{server.home}/run")
    until(lambda: begun.goto(address) and "seed: 8" in yaml(begun), SECONDS)
