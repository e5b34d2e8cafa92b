"""Two tabs, an editor and the other pages change one recipe: nothing that was typed or written is lost unsaid."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

PATH = "blend.yaml"
THEIRS, MINE = "seed: 1\n", "seed: 2\n"


class Tab:
    """A page of the recipe: it sends what it shows, and what it goes back to, as the browser does."""

    def __init__(self, client: TestClient, path: str = PATH) -> None:
        self.client, self.path = client, path
        page = client.get("/recipe", params={"path": path})
        self.first = page.text
        self.claim = claim(page)
        self.yaml = shown(page.text)
        assert set(self.claim) == {"ground", "seen", "tab"}

    def post(self, where: str, partial: bool = True, **more: str) -> Any:
        headers = {"hx-request": "true"} if partial else {}
        form = {"path": self.path, "yaml": self.yaml, **self.claim, **more}
        answer = self.client.post(f"/recipe/{where}", data=form, headers=headers)
        self.claim |= claim(answer) if answer.status_code == 200 else {}
        return answer

    def types(self, text: str) -> Any:
        self.yaml = text
        return self.post("yaml")

    def looks(self, told: str = "") -> Any:
        query = {"path": self.path, "told": told, **self.claim}
        return self.client.get("/recipe/clash", params=query, headers={"hx-request": "true"})


def claim(answer: Any) -> dict[str, str]:
    """What a page goes back to from now on."""
    grounds = answer.text.partition('id="grounds"')[2].partition("</span>")[0]
    return dict(re.findall(r'name="(ground|seen|tab)" value="(\w*)"', grounds))


def shown(text: str) -> str:
    found = re.search(r"<textarea[^>]*>\n?(.*?)</textarea>", text, re.DOTALL)
    assert found
    return html.unescape(found[1])


def offered(text: str) -> dict[str, str]:
    """What the button of a refusal sends that goes on with what this tab shows."""
    found = re.search(r"hx-vals='([^']*)'", text)
    assert found
    return dict(re.findall(r'"(\w+)": "([^"]*)"', html.unescape(found[1])))


def refused(answer: Any, *words: str) -> str:
    """One line that says what happened, with both ways."""
    assert answer.status_code == 409, answer.text
    said = html.unescape(str(answer.text))
    for word in words:
        assert word in said
    assert said.count('class="clash"') == 1
    return said


@pytest.fixture
def before(folder: Path) -> str:
    return (folder / PATH).read_text()


def test_a_save_writes_over_nothing_that_the_tab_has_not_seen(client: TestClient, folder: Path, before: str) -> None:
    a, b = Tab(client), Tab(client)
    a.yaml += THEIRS
    assert a.post("save").status_code == 200
    b.yaml += MINE
    said = refused(b.post("save"), "blend.yaml has changed on disk", "Reload theirs", "Overwrite with mine")
    assert (folder / PATH).read_text() == before + THEIRS
    assert b.post("save", **offered(said)).status_code == 200
    assert (folder / PATH).read_text() == before + MINE
    assert b.post("save").status_code == 200  # its ground is what it has written
    a.yaml += "nonfinite: allow\n"
    refused(a.post("save"), "has changed on disk")
    assert client.post("/recipe/revert", data={"path": PATH, **a.claim}).status_code == 303
    assert Tab(client).yaml == before + MINE


def test_an_overwrite_is_of_what_was_told(client: TestClient, folder: Path, before: str) -> None:
    tab = Tab(client)
    (folder / PATH).write_text(before + THEIRS)
    said = refused(tab.post("save", yaml=before + MINE), "changed on disk")
    (folder / PATH).write_text("models: {a: models/math}\nmethod: linear\n")
    tab.yaml = before + MINE
    refused(tab.post("save", **offered(said)), "changed on disk")
    assert "linear" in (folder / PATH).read_text()


def test_an_editor_beside_an_open_page(client: TestClient, folder: Path, before: str) -> None:
    tab = Tab(client)
    assert tab.looks().status_code == 204
    (folder / PATH).write_text(before + THEIRS)
    told = tab.looks()
    assert "has changed on disk" in told.text
    mark = re.search(r'name="told" value="([\w.]+)"', told.text)
    assert mark
    assert tab.looks(mark[1]).status_code == 204  # which is told once
    assert "has changed on disk" in tab.types(before + MINE).text  # and kept as a draft beside it
    page = Tab(client).first
    assert "not saved yet" in page
    assert "has changed on disk" in page
    (folder / PATH).write_text(before)
    assert tab.looks(mark[1]).text.strip() == ""  # it is as it was
    (folder / PATH).unlink()
    said = refused(tab.post("save"), "was deleted", "Let it go", "Write it again")
    assert not (folder / PATH).exists()
    assert tab.post("save", **offered(said)).status_code == 200
    assert (folder / PATH).read_text() == before + MINE


def test_drafts_of_two_tabs_do_not_lose_each_other(client: TestClient, folder: Path, before: str) -> None:
    a, b = Tab(client), Tab(client)
    assert a.types(before + THEIRS).status_code == 200
    assert a.types(before + THEIRS + "nonfinite: allow\n").status_code == 200
    assert "was changed in another tab" in b.looks().text
    for answer in (
        b.post("revert"), b.types(before + MINE), b.post("save"), b.post("run", out="x"),
        b.post("set", key='["seed"]', value="3"),
    ):  # fmt: skip
        said = refused(answer, "was changed in another tab", "Take that", "Go on with mine")
    assert shown(said) == before + "seed: 3\n"  # the field that was set is not lost either
    assert "was changed in another tab" in client.get("/recipe/plan", params={"path": PATH, **b.claim}).text
    assert Tab(client).yaml == before + THEIRS + "nonfinite: allow\n"
    b.yaml = shown(said)
    assert b.post("yaml", **offered(said)).status_code == 200
    assert Tab(client).yaml == before + "seed: 3\n"
    refused(a.types(before + THEIRS), "was changed in another tab")
    assert (folder / PATH).read_text() == before


def test_a_tab_is_never_in_its_own_way(client: TestClient, folder: Path, before: str) -> None:
    """What it sends may leave before the answer to what it sent last: its name counts then."""
    tab = Tab(client)
    old = dict(tab.claim)
    assert tab.types(before + MINE).status_code == 200
    tab.yaml += "nonfinite: allow\n"
    assert tab.post("yaml", **old).status_code == 200
    assert tab.post("run", partial=False, out="x", **old).headers["location"] == "/run/0001"
    assert (folder / PATH).read_text() == before + MINE + "nonfinite: allow\n"


def test_what_is_shown_is_what_is_run(client: TestClient, folder: Path, before: str) -> None:
    a, b = Tab(client), Tab(client)
    a.yaml = (before + THEIRS).replace("\n", "\r\n")  # as forms send it
    assert a.post("run", partial=False, out="x").status_code == 303
    assert (folder / PATH).read_bytes() == (before + THEIRS).encode()
    b.yaml = before + MINE
    page = b.post("run", partial=False, out="y")
    refused(page, "has changed on disk", "Overwrite with mine")
    assert shown(page.text) == before + MINE
    assert "not saved yet" in page.text
    assert b.post("inspect", partial=False).status_code == 409
    listed = client.get("/run").text
    assert "merge into x" in listed
    assert "merge into y" not in listed


def test_two_new_recipes_of_one_name(client: TestClient, folder: Path) -> None:
    a, b = Tab(client, "recipe.yaml"), Tab(client, "recipe.yaml")
    for tab, model in ((a, "math"), (b, "code")):
        tab.yaml = f"models: {{x: models/{model}}}\nmethod: linear\n"
    assert a.post("save").status_code == 200
    refused(b.post("save"), "recipe.yaml has changed on disk")
    assert "models/math" in (folder / "recipe.yaml").read_text()


def test_other_pages_change_a_recipe_that_is_open(client: TestClient, before: str) -> None:
    tab = Tab(client)
    client.post("/recipe/add", data={"recipe": PATH, "path": ["models/base"]})
    refused(tab.types(before + MINE), "was changed in another tab")
    assert ": models/base\n" in Tab(client).yaml.partition("models:")[2]


def test_a_file_with_other_ends_of_lines_stays_as_it_is(client: TestClient, folder: Path, before: str) -> None:
    raw = before.replace("\n", "\r\n").encode()
    (folder / PATH).write_bytes(raw)
    tab = Tab(client)
    assert tab.yaml == before
    assert "not saved yet" not in tab.first
    assert tab.post("save").status_code == 200
    assert tab.post("run", partial=False, out="x").status_code == 303
    assert (folder / PATH).read_bytes() == raw
