"""The studio in a real browser: Debian's chromium, driven by Playwright; `make setup-studio` installs both.

What it looked like is kept in .studio/ for people to look at; WEIGHTSMITH_PICTURE=1 renews the picture in docs/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_kit import EVIL, answered, small_folder, until, write_model

from weightsmith.recipe.sweep import expand
from weightsmith.studio.jobs import Jobs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    pytest.skip("no Playwright: make setup-studio installs it", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("no chromium: make setup-studio installs it", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / ".studio"
SECONDS = 90
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 812}


class Server:
    """`weightsmith studio` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-m", "weightsmith", "studio", str(folder), "--no-browser", "--port", "0"]
        self.folder = folder
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found, "it printed no address"
        self.address = found[0]
        self.home = self.address.partition("/?")[0]

    def end(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)
        self.process.wait(120)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One key for the whole module."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def server(state: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all that do not end it; each test has recipes and results of its own."""
    made = Server(small_folder(tmp_path_factory.mktemp("browser") / "home"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


def opened(browser: Browser, server: Server, **options: Any) -> Page:
    """A page that holds the token; whatever goes wrong in it fails the test."""
    page = browser.new_context(**{"viewport": WIDE, **options}).new_page()
    page.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    page.on("pageerror", lambda error: pytest.fail(f"a script failed: {error}"))
    page.on("dialog", lambda dialog: pytest.fail("a script of a file ran"))
    page.goto(server.address)
    return page


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    made = opened(browser, server)
    yield made
    made.context.close()


def ready(page: Page) -> None:
    expect(page.locator("#plan h2")).to_have_text("Ready to run")


def yaml(page: Page) -> str:
    return page.locator("#yaml").input_value()


def chosen(page: Page, *models: str) -> None:
    """Add models of the folder to the recipe, by its buttons."""
    for name in models:
        page.get_by_role("button", name=f"Add {name}", exact=True).click()
        expect(page.locator("#yaml")).to_have_value(re.compile(rf": {re.escape(name)}\n"))


def test_a_recipe_by_mouse_from_the_first_click_to_verified(folder: Path, browser: Browser) -> None:
    server = Server(folder)
    page = opened(browser, server)
    page.goto(f"{server.home}/recipe")
    chosen(page, "models/math", "models/code")
    expect(page.locator("#plan")).to_contain_text("problem")  # task vectors need a base
    page.get_by_role("button", name="models/base as base").click()
    ready(page)
    page.select_option("#stage-0", "ties")
    page.fill("#f-stage-0-density", "7")
    page.locator("#f-stage-0-density").blur()
    expect(page.locator("#plan")).to_contain_text("density = 7 is outside (0, 1]")
    page.fill("#f-stage-0-density", "0.3")
    page.locator("#f-stage-0-density").blur()
    ready(page)
    assert "density: 0.3" in yaml(page)
    page.fill("#yaml", yaml(page).replace("0.3", "0.4"))
    expect(page.locator("#f-stage-0-density")).to_have_value("0.4")
    page.fill("#out", "merged")
    jobs = Jobs(server.folder / ".weightsmith-studio", server.folder)
    page.click("#run")
    pid = jobs.folder / "0001" / "pid"
    number = int(until(lambda: pid.exists() and pid.read_text()))
    os.kill(number, signal.SIGSTOP)
    server.end(signal.SIGKILL)
    os.kill(number, signal.SIGKILL)
    page.context.close()
    assert not (server.folder / "merged").exists()

    again = Server(server.folder)
    try:
        page = opened(browser, again)
        page.goto(f"{again.home}/run")
        expect(page.locator("#jobs .state").first).to_have_text("interrupted")
        page.click("#job-0001")
        page.click("#resume")
        expect(page.locator("#state")).to_have_text("finished")
        expect(page.locator(".command code")).to_contain_text("merge recipe.yaml merged --resume")
        page.click("#verify")
        expect(page.locator("#log")).to_contain_text("as it was written")
        page.goto(f"{again.home}/history/of?path=merged")
        expect(page.locator(".tree")).to_contain_text("ties(density=0.4)")
        page.context.close()
    finally:
        again.end()


def test_a_ramp_is_drawn(page: Page, server: Server) -> None:
    page.goto(f"{server.home}/recipe?path=blend.yaml")
    page.locator('[data-ramp=\'["stage", 0, "density"]\']').click()
    svg = page.locator(".ramp svg")
    expect(svg).to_be_visible()
    svg.evaluate("e => e.scrollIntoView({block: 'center'})")
    before = yaml(page)
    assert re.search(r"density: \[(\S+, ){4}\S+\]", before)
    box = svg.bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.07 * box["width"], box["y"] + 0.8 * box["height"])
    page.mouse.down()
    for share in (0.3, 0.5, 0.7, 0.97):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + (0.85 - 0.7 * share) * box["height"], steps=4)
    page.mouse.up()
    expect(page.locator("#yaml")).not_to_have_value(before)
    drawn = [float(v) for v in re.search(r"density: \[(.*)\]", yaml(page))[1].split(",")]  # type: ignore[index]
    assert len(drawn) == 5
    assert drawn == sorted(drawn)
    assert drawn[-1] - drawn[0] > 0.4
    ready(page)
    before = yaml(page)
    page.locator(".ramp circle").nth(2).focus()
    page.keyboard.press("ArrowUp")
    expect(page.locator("#yaml")).not_to_have_value(before)
    page.locator(".ramp input").fill("9")
    page.locator(".ramp input").blur()
    expect(page.locator(".ramp circle")).to_have_count(9)
    page.get_by_role("button", name="one for each of 3 blocks").click()
    expect(page.locator(".ramp rect")).to_have_count(3)
    svg.evaluate("e => e.scrollIntoView({block: 'center'})")
    box = svg.bounding_box()
    assert box
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.12 * box["height"])
    expect(page.locator(".ramp .row")).to_contain_text("points")
    expect(page.locator("#yaml")).to_have_value(re.compile(r"density: \[[^,]+, (0\.9\d*|1), [^,]+\]"))


def dragged(page: Page, source: str, target: str) -> None:
    """Drag with the mouse; both ends have to be in sight, as a hand needs them."""
    page.locator("#palette > summary").evaluate("e => e.scrollIntoView({block: 'center'})")
    page.locator(source).evaluate("e => e.scrollIntoView({block: 'nearest'})")
    (a, b) = (page.locator(one).bounding_box() for one in (source, target))
    assert a
    assert b
    page.mouse.move(a["x"] + 8, a["y"] + 8)
    page.mouse.down()
    page.mouse.move(a["x"] + 20, a["y"] + 2, steps=3)
    page.mouse.move(b["x"] + 8, b["y"] + 8, steps=6)
    page.mouse.up()


def test_twelve_experts_some_of_them_dragged(page: Page, server: Server) -> None:
    for i in range(12):
        write_model(server.folder / f"models/e{i:02d}", 10 + i)
    page.goto(f"{server.home}/models")
    for i in range(10):
        page.check(f'[value="models/e{i:02d}"]')
    page.get_by_role("button", name="Add to recipe").click()
    for i in (10, 11):
        expect(page.locator(".entry input.short")).to_have_count(i)
        page.wait_for_timeout(500)  # nobody drags what is just being drawn anew
        dragged(page, f'li[data-path="models/e{i}"] .name', f'[data-rename="e{i - 1:02d}"]')
        expect(page.locator("#yaml")).to_have_value(re.compile(rf"e{i}: models/e{i}\n"))
    page.get_by_role("button", name="models/base as base").click()
    ready(page)
    expect(page.locator(".entry input.short")).to_have_count(12)
    expect(page.locator("#plan")).to_contain_text("merged by task_arithmetic")
    page.set_viewport_size({"width": 1200, "height": 700})
    expect(page.locator("#run")).to_be_in_viewport(ratio=1)
    page.fill("#out", "twelve")
    page.click("#run")
    expect(page.locator("#state")).to_have_text("finished")
    page.get_by_role("link", name="How it was made").click()
    expect(page.locator(".tree > li > .leaf")).to_be_in_viewport(ratio=1)  # above a row that is wider than the page


def test_a_row_of_models_is_dragged_onto_a_recipe_and_a_double_click_merges_once(page: Page, server: Server) -> None:
    folder = server.folder
    (folder / "drag.yaml").write_text("base: models/base\nmodels: {math: models/math}\nmethod: ties\n")
    page.set_viewport_size({"width": 1280, "height": 1600})
    page.goto(f"{server.home}/models")
    (a, b) = (page.locator(one).bounding_box() for one in ('tr[data-path="models/code"]', '[data-drop="drag.yaml"]'))
    assert a
    assert b
    page.mouse.move(a["x"] + 0.6 * a["width"], a["y"] + 8)
    page.mouse.down()
    page.mouse.move(a["x"] + 0.6 * a["width"] + 10, a["y"] + 14, steps=3)
    page.mouse.move(b["x"] + 10, b["y"] + 8, steps=6)
    page.mouse.up()
    page.wait_for_url("**/recipe?path=drag.yaml")
    assert "code: models/code" in yaml(page)
    ready(page)
    page.fill("#out", "dragged")
    page.dblclick("#run")
    page.wait_for_url("**/run/*")
    page.goto(f"{server.home}/run")
    expect(page.locator("#jobs td.name", has_text="merge into dragged")).to_have_count(1)


def tab_to(page: Page, selector: str, most: int = 150) -> None:
    """Press Tab until something has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


def test_everything_by_keyboard(page: Page, server: Server) -> None:
    page.goto(f"{server.home}/models")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the page
    for name in ("math", "code"):
        tab_to(page, f'[value="models/{name}"]')
        page.keyboard.press("Space")
        page.evaluate("document.querySelector('main').focus()")
    tab_to(page, "button.primary")
    page.keyboard.press("Enter")
    page.wait_for_url("**/recipe?path=*")
    tab_to(page, '[aria-label="models/base as base"]')
    page.keyboard.press("Enter")
    ready(page)
    page.evaluate("document.querySelector('main').focus()")
    tab_to(page, "#out")
    page.keyboard.press("Control+A")
    page.keyboard.type("by-keys")
    tab_to(page, "#run")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("finished")
    tab_to(page, "#verify")
    page.keyboard.press("Enter")
    expect(page.locator("#log")).to_contain_text("as it was written")


def test_two_tabs_and_a_reload_agree(page: Page, server: Server) -> None:
    page.goto(f"{server.home}/recipe?path=blend.yaml")
    page.fill("#f-seed", "7") if page.locator("#f-seed").is_visible() else page.locator("#settings summary").click()
    page.fill("#f-seed", "7")
    page.locator("#f-seed").blur()
    expect(page.locator("#yaml")).to_have_value(re.compile("seed: 7"))
    other = page.context.new_page()
    other.goto(f"{server.home}/recipe?path=blend.yaml")
    assert yaml(other) == yaml(page)
    page.reload()
    assert "seed: 7" in yaml(page)
    other.fill("#yaml", yaml(other).replace("seed: 7", "seed: 8"))
    expect(page.locator("#clash")).to_contain_text("was changed in another tab")
    page.fill("#f-seed", "9")
    page.locator("#f-seed").blur()
    expect(page.locator("#yaml")).to_have_value(re.compile("seed: 9"))  # shown here, and kept nowhere yet
    page.get_by_role("button", name="Go on with mine").click()
    expect(page.locator(".clash")).to_have_count(0)
    expect(other.locator("#clash")).to_contain_text("was changed in another tab")
    other.get_by_role("link", name="Take that").click()
    expect(other.locator("#yaml")).to_have_value(re.compile("seed: 9"))
    file = server.folder / "blend.yaml"
    before = file.read_text()
    file.write_text(f"# an editor\n{before}")
    page.click("#save")
    expect(page.locator("#clash")).to_contain_text("has changed on disk")
    assert file.read_text() == f"# an editor\n{before}"
    page.get_by_role("button", name="Reload theirs").click()
    expect(page.locator("#yaml")).to_have_value(re.compile("# an editor"))
    page.fill("#yaml", before)
    expect(page.locator("#saved-state")).to_have_text("not saved yet")
    page.click("#save")
    expect(page.locator("#saved-state")).to_have_text("saved")
    expect(page.locator(".clash")).to_have_count(0)
    assert file.read_text() == before


SHIFT = """() => new Promise(done => { let sum = 0; const seen = new PerformanceObserver(list => {
  for (const one of list.getEntries()) sum += one.value; });
  seen.observe({type: "layout-shift", buffered: true}); setTimeout(() => done(sum), 300); })"""


def test_progress_moves_nothing_else(page: Page, server: Server) -> None:
    folder = server.folder
    os.mkfifo(folder / "pipe")
    (folder / "wait.py").write_text(f"open({str(folder / 'pipe')!r}).read()\n")
    jobs = Jobs(folder / ".weightsmith-studio", folder)
    job = jobs.add(["merge", "blend.yaml", "slow", "--plugin", "wait.py"], "merge into slow")
    page.goto(f"{server.home}/run/{job.id}")
    expect(page.locator("#state")).to_have_text("running")
    for done in (0, 3_000_000, 1_234_567_890, 4_000_000_000):
        noted = f'{{"done": {done}, "total": 4000000000, "first": 0, "seconds": 2.5, "unit": "bytes"}}'
        (job.folder / "progress").write_text(noted)
        expect(page.locator("#words")).to_contain_text("of 4 GB")
        page.wait_for_timeout(400)
    expect(page.locator("#words")).to_contain_text("4 GB of 4 GB, 1.6 GB/s, 0.0 s left")
    assert page.evaluate(SHIFT) == 0
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#resume")).to_be_visible()


CONTRAST = """() => {
  const parse = c => { const v = c.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const linear = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !e.checkVisibility() || e.closest("script, option, datalist, .hidden, .skip")) continue;
    const grounds = [];
    for (let one = e; one; one = one.parentElement) {
      const c = parse(getComputedStyle(one).backgroundColor);
      if (c[3]) grounds.unshift(c);
    }
    const ground = grounds.reduce((below, c) => over(c, below), [255, 255, 255]);
    const ink = getComputedStyle(e)[e.closest("svg") ? "fill" : "color"];
    const [a, b] = [light(ground), light(over(parse(ink), ground))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className}: ${text.slice(0, 40)}`);
  }
  return found; }"""


def filled(folder: Path) -> Path:
    """A folder with something on every page: a merge, an inspection, a comparison, a grid, a search, markup."""
    small_folder(folder)
    evil = write_model(folder / "models/evil", 5, evil=True)
    (evil / "README.md").write_text(f"---\nlicense: mit\n---\n{EVIL}<script>alert(1)</script>")
    text = (folder / "blend.yaml").read_text() + "parameters:\n  density: [0.3, 0.55, 0.8]\n"
    (folder / "blend.yaml").write_text(text)
    (folder / "found").mkdir()
    (folder / "found/recipe.yaml").write_text(text)
    shutil.copy(Path(__file__).with_name("result.json"), folder / "found/result.json")
    jobs = Jobs(folder / ".weightsmith-studio", folder)
    sets = ["parameters.density=0.2,0.5", "parameters.lambda=0.5,1"]
    words = ["merge", "blend.yaml", "grid", "--set", sets[0], "--set", sets[1]]
    for job in (
        jobs.add(["merge", "blend.yaml", "merged"], "merge into merged", {"recipe": "blend.yaml", "out": "merged"}),
        jobs.add(["inspect", "blend.yaml", "--json"], "inspect blend.yaml", {"recipe": "blend.yaml"}),
        jobs.add(["diff", "models/math", "merged", "--json"], "math and merged", {"a": "models/math", "b": "merged"}),
        jobs.add(words, "4 merges of blend.yaml", {"out": "grid", "grid": sets, "recipe": "blend.yaml"}),
    ):
        answered(job)
    assert {job.state for job in jobs.all()} == {"finished"}
    for models, prompt in ((["models/math", "merged"], "2 and 2 make"), ([f"grid/{n}" for n in expand(sets)], "")):
        report = {"models": {name: {"perplexity": 9.5 + i, "bits_per_byte": 1.25} for i, name in enumerate(models)},
                  "problems": [], "notes": [], "answers": dict.fromkeys(models, f"4 {EVIL}")}  # fmt: skip
        about = {"out": models[0], "beside": models[1:], "prompt": prompt}
        answered(jobs.add(["check", models[0], "--json"], "measure", about), json.dumps(report))
    return folder


PAGES = {
    "models": "/models", "model": "/model?path=models/evil", "recipe": "/recipe?path=blend.yaml", "run": "/run",
    "job": "/run/0001", "inspect": "/inspect", "inspection": "/inspect/0002", "compare": "/compare",
    "comparison": "/compare/0003", "grid": "/grid", "grid-result": "/grid/0004", "fronts": "/fronts",
    "front": "/fronts/of?path=found", "history": "/history", "result": "/history/of?path=merged",
    "methods": "/methods", "method": "/methods/ties", "error": "/model?path=../x",
}  # fmt: skip


def test_every_page_at_two_widths_in_light_and_dark(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Screenshots for people; and no page is wider than a telephone, or too pale to read."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    server = Server(filled(tmp_path / "home"))
    page = opened(browser, server)
    SHOTS.mkdir(exist_ok=True)
    for name, path in PAGES.items():
        page.goto(server.home + path)
        if name == "recipe":
            ready(page)
        for size, kept in ((WIDE, "light"), (NARROW, "dark")):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], (name, size)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                assert page.evaluate(CONTRAST) == [], (name, scheme, size)
                if scheme == kept:
                    page.screenshot(path=SHOTS / f"{name}-{size['width']}-{scheme}.png", full_page=True)
    if os.environ.get("WEIGHTSMITH_PICTURE"):
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1200, "height": 980})
        page.goto(server.home + PAGES["recipe"])
        ready(page)
        page.click("#palette > summary")
        page.screenshot(path=ROOT / "docs/studio.png")
    page.context.close()
    server.end()


def test_the_picture_in_the_readme_is_small() -> None:
    assert (ROOT / "docs/studio.png").stat().st_size < 200_000
