"""Who gets in, and what a hostile file can do: nothing but be shown as text."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from studio_kit import EVIL, HOME, PORT, TOKEN, write_model

from weightsmith.studio.app import build
from weightsmith.studio.pages import ROUTES

GETS = [path.replace("{id}", "0001").replace("{name}", "ties") for method, path, *_ in ROUTES if method == "GET"]
POSTS = [path.replace("{id}", "0001") for method, path, *_ in ROUTES if method == "POST"]


@pytest.fixture
def stranger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A client without the token."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return TestClient(build((folder,), TOKEN, PORT), base_url=HOME, follow_redirects=False)


def test_without_the_token_nothing_is_answered(stranger: TestClient) -> None:
    for path in (*GETS, "/static/studio.js", "/nothing", "/models?token=", "/models?token=guessed"):
        answer = stranger.get(path)
        assert answer.status_code == 403, path
        assert "token" in answer.text
        assert "models/" not in answer.text
        assert "set-cookie" not in answer.headers


def test_nothing_changes_without_the_token_or_from_elsewhere(
    stranger: TestClient, client: TestClient, folder: Path
) -> None:
    form = {"path": "blend.yaml", "out": "x"}
    for path in POSTS:
        assert stranger.post(path, data=form, headers={"origin": HOME}).status_code == 403
        for origin in ("http://evil.example", f"http://127.0.0.1:{PORT + 1}", f"https://127.0.0.1:{PORT}", "null"):
            answer = client.post(path, data=form, headers={"origin": origin})
            assert answer.status_code == 403, path
            assert "another site" in answer.text
    del client.headers["origin"]
    assert {client.post(path, data=form).status_code for path in POSTS} == {403}
    assert not (folder / "x").exists()
    assert not list((folder / ".weightsmith-studio/jobs").iterdir())


def test_another_name_of_this_machine_is_refused(client: TestClient) -> None:
    """A page of another site may have its name point here, with the token in nobody's hand but its cookie's."""
    near = ("127.0.0.1", f"127.0.0.1:{PORT + 1}", f"127.0.0.1.nip.io:{PORT}", f"[::1]:{PORT}", f"0.0.0.0:{PORT}", "")
    for host in ("evil.example", f"evil.example:{PORT}", *near):
        assert client.get("/models", headers={"host": host}).status_code == 421, host
        assert client.get("/models", params={"token": TOKEN}, headers={"host": host}).status_code == 421


def test_the_cookie_is_no_other_sites(stranger: TestClient) -> None:
    answer = stranger.get("/recipe", params={"token": TOKEN, "path": "a b.yaml"})
    assert answer.headers["location"] == "/recipe?path=a+b.yaml"
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert stranger.get("/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert stranger.get("/models", headers={"sec-fetch-site": "none"}).status_code == 200
    away = stranger.get(f"{HOME}//evil.example/x", params={"token": TOKEN})
    assert away.headers["location"] == "/evil.example/x"


def test_every_answer_forbids_scripts_that_are_not_ours(client: TestClient) -> None:
    for path in ("/models", "/static/studio.js", "/nothing", "/recipe?path=../x.yaml"):
        headers = client.get(path).headers
        assert "script-src 'self';" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"  # with none, forms have no Origin


def test_other_methods_are_refused(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert client.request(method, "/models").status_code == 405


@pytest.mark.parametrize("way", ["../secret.yaml", "/etc/passwd.yaml", "models/../../secret.yaml", "link.yaml",
                                 "out/secret.yaml", "x\0.yaml"])  # fmt: skip
def test_no_path_leads_out_of_the_folders(client: TestClient, folder: Path, way: str) -> None:
    secret = folder.parent / "secret.yaml"
    secret.write_text("models: {a: SECRET}\nmethod: linear\n")
    (folder / "link.yaml").symlink_to(secret)
    (folder / "out").symlink_to(folder.parent)
    for answer in (
        client.get("/recipe", params={"path": way}),
        client.get("/recipe/plan", params={"path": way}),
        client.get("/model", params={"path": way}),
        client.post("/recipe/save", data={"path": way, "yaml": "broken"}),
        client.post("/recipe/set", data={"path": way, "yaml": "method: linear", "key": '["seed"]', "value": "1"}),
        client.post("/recipe/run", data={"path": way, "out": "x"}),
        client.post("/recipe/run", data={"path": "blend.yaml", "out": way}),
        client.post("/recipe/add", data={"path": way, "recipe": "blend.yaml"}),
        client.post("/verify", data={"out": way}),
        client.post("/check", data={"out": way}),
    ):
        assert answer.status_code == 403
        assert "outside the folders that the studio was started with" in answer.text
        assert "SECRET" not in answer.text
    assert secret.read_text().endswith("linear\n")


@pytest.mark.parametrize("out", ["~/x", "./~", "~root/x", ".weightsmith-studio/jobs", ".weightsmith-studio"])
def test_no_output_goes_home_or_into_the_studios_state(client: TestClient, folder: Path, out: str) -> None:
    """Commands expand ~, and what the studio notes of its jobs lies among the folders."""
    grid = {"key1": "parameters.density", "values1": "0.1, 0.2"}
    for where in ("/recipe/run", "/grid"):
        answer = client.post(where, data={"path": "blend.yaml", "out": out, "overwrite": "yes", **grid})
        assert answer.status_code == 403
        assert "home folder" in answer.text or "keeps its own jobs" in answer.text
    assert not list((folder / ".weightsmith-studio/jobs").iterdir())


def test_odd_requests_are_answered_in_words(client: TestClient, folder: Path) -> None:
    odd = {"path": "blend.yaml", "yaml": "models: 3\nmethod: [1]\n", "key": '["stage",-1,"weight"]', "value": "1"}
    for where, data, words in (
        ("/recipe/set", odd, "that stage is gone"),
        (
            "/recipe/stage",
            {"path": "blend.yaml", "yaml": "method: ties\n", "do": "remove-stage", "index": "99"},
            "gone",
        ),
        ("/verify", {}, "name the folder"),
        ("/check", {"out": " "}, "name the folder"),
    ):
        answer = client.post(where, data=data)
        assert answer.status_code == 400
        assert words in answer.text
    for recipe in folder.glob("*.yaml"):
        recipe.unlink()
    assert client.get("/grid").status_code == 200


@pytest.mark.parametrize("kind", ["model", "adapter", "stats", "nested", "linked weights", "address"])
def test_a_recipe_leads_nowhere_else(client: TestClient, folder: Path, kind: str) -> None:
    """A recipe that somebody sent is looked at while it is open: what it names elsewhere stays closed."""
    elsewhere = write_model(folder.parent / "elsewhere", 7)
    (folder / "inner.yaml").write_text(f"models: {{a: {elsewhere}, b: models/math}}\nmethod: linear\n")
    write_model(folder / "models/linked", 8)
    (folder / "models/linked/model.safetensors").unlink()
    (folder / "models/linked/model.safetensors").symlink_to(elsewhere / "model.safetensors")
    ref = {
        "model": str(elsewhere), "adapter": f"{{model: models/code, adapter: {elsewhere}}}",
        "stats": "{model: models/code, stats: [../elsewhere]}", "nested": "inner.yaml",
        "linked weights": "models/linked", "address": "http://127.0.0.1:9/x",
    }[kind]  # fmt: skip
    text = f"base: models/base\nmodels: {{math: models/math, x: {ref}}}\nmethod: ties\n"
    client.post("/recipe/yaml", data={"path": "blend.yaml", "yaml": text})
    shown = client.get("/recipe/plan", params={"path": "blend.yaml"}).text
    assert "outside the folders that the studio was started with" in shown
    assert "Ready" not in shown
    for where in ("/recipe/run", "/inspect", "/grid"):
        grid = {"key1": "parameters.density", "values1": "0.1, 0.2"}
        answer = client.post(where, data={"path": "blend.yaml", "out": "x", **grid})
        assert answer.status_code == 400
        assert "outside the folders" in answer.text
    assert not list((folder / ".weightsmith-studio/jobs").iterdir())


BOMBS = {
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join([f'*{chr(ord(n) - 1)}'] * 9)}]\n" for n in "bcdefghi"),
    "depth": "[" * 100_000,
    "tag": "models: !!python/object/apply:os.system ['touch pwned']\nmethod: ties\n",
    "merge key": "x: &x {a: b}\nmodels: {<<: *x}\nmethod: ties\n",
    "number": "seed: " + "9" * 200_000,
    "control": "models: {a: \x1b[31m}\nmethod: ties\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_of_yaml_are_a_problem_and_no_more(client: TestClient, folder: Path, name: str) -> None:
    for where, more in (
        ("yaml", {}),
        ("set", {"key": '["seed"]', "value": "1"}),
        ("set", {"key": '["seed"]', "value": BOMBS[name]}),
    ):
        answer = client.post(f"/recipe/{where}", data={"path": "blend.yaml", "yaml": BOMBS[name], **more})
        assert answer.status_code in (200, 400)
        assert answer.elapsed.total_seconds() < 20
    page = client.get("/recipe", params={"path": "blend.yaml"})
    assert page.status_code == 200
    assert "problem" in page.text
    assert not (folder / "pwned").exists()


def test_large_forms_are_refused(client: TestClient) -> None:
    large = "x" * 10_000_000
    assert client.post("/recipe/yaml", data={"path": "blend.yaml", "yaml": large}).status_code == 413
    chunks = (b"yaml=" + b"x" * 1_000_000 for _ in range(10))  # no length is announced
    assert client.post("/recipe/yaml", content=chunks).status_code == 413
    assert client.post("/recipe/yaml", content=b"&".join([b"a=1"] * 6000)).status_code == 400
    assert client.post("/recipe/yaml", content=b"\xff\xfe").status_code in (400, 403)
    assert client.post("/recipe/yaml", data={"path": "blend.yaml", "yaml": "x" * 1_500_000}).status_code in (200, 400)


def test_a_field_that_is_none_is_refused(client: TestClient) -> None:
    text = "models: {a: models/math}\nmethod: linear\n"
    wrong = ("", "[]", "7", "{", '[["a"]]', "[" * 9000, '["stage", 9, "density"]', '["models", 0]', "[null]")
    for key in (*wrong, '["a", 5, "b"]'):
        answer = client.post("/recipe/set", data={"path": "blend.yaml", "yaml": text, "key": key, "value": "1"})
        assert answer.status_code in (200, 400), key
        if answer.status_code == 200:
            assert "problem" in client.get("/recipe/plan", params={"path": "blend.yaml"}).text


def test_markup_from_files_is_text(client: TestClient, folder: Path) -> None:
    model = write_model(folder / "models/evil", 3, evil=True)
    (model / "README.md").write_text(f"---\nlicense: '{EVIL}'\n---\n<script>alert(2)</script> {EVIL}")
    (model / "config.json").write_text('{"architectures": ["<script>alert(3)</script>"], "torch_dtype": "<b>x"}')
    named = folder / "models/<script>alert(4)<"
    write_model(named, 4)
    name = EVIL.replace('"', "")
    text = f"models: {{'{name}': 'models/evil', b: models/math}}\nmethod: '<script>alert(5)</script>'\n"
    pages = [
        client.get("/models"),
        client.get("/model", params={"path": "models/evil"}),
        client.get("/model", params={"path": f"models/{named.name}"}),
        client.get("/model", params={"path": "models/evil", "q": EVIL}),
        client.post("/recipe/yaml", data={"path": "blend.yaml", "yaml": text}),
        client.get("/recipe", params={"path": "blend.yaml"}),
        client.get("/recipe/plan", params={"path": "blend.yaml"}),
        client.get("/recipe", params={"path": f"{EVIL}.yaml"}),
        client.get("/methods/" + "%3Cscript%3Ealert(6)%3C%2Fscript%3E"),
    ]
    for page in pages:
        assert page.status_code in (200, 400, 404)
        assert "<script>alert" not in page.text
        assert "<img" not in page.text
        assert "<b>x" not in page.text
    assert "&lt;script&gt;alert(2)" in pages[1].text
    assert "&lt;img src=x" in pages[1].text


@pytest.mark.parametrize("name", ["x" * 300, "x" * 240 + ".yaml", "a/" * 5000 + "b.yaml"])
@pytest.mark.parametrize("page", ["/model", "/recipe", "/history/of", "/grid"])
def test_names_that_no_file_can_have_are_a_problem(client: TestClient, page: str, name: str) -> None:
    answer = client.get(page, params={"path": name})
    assert answer.status_code == 400
    assert "too long for a file" in answer.text


def test_a_page_names_no_evaluator(client: TestClient) -> None:
    """What scores models is code: it is named where the studio is started, and by nothing that a page sends."""
    form = {"a": "models/base", "b": "models/math", "score": "yes", "evaluator": "evil.py"}
    answer = client.post("/compare", data=form)
    assert answer.status_code == 400
    assert "no evaluator was named" in answer.text
    assert "Nothing has run yet" in client.get("/run").text


def test_digits_that_are_no_numbers(client: TestClient, folder: Path) -> None:
    (folder / ".weightsmith-studio/jobs/²").mkdir()  # '²'.isdigit()
    assert client.get("/model", params={"path": "models/base", "first": "²"}).status_code == 400
    assert client.post("/recipe/inspect", data={"path": "blend.yaml", "spectra": "²"}).status_code == 400


def test_a_name_is_never_an_option(client: TestClient, folder: Path) -> None:
    """A folder from elsewhere may be called --plugin=x.py, with a file x.py beside it."""
    write_model(folder / "--plugin=x.py", 7)
    assert "?path=./--plugin" in html.unescape(client.get("/models").text).replace("%2F", "/").replace("%3D", "=")
    where = client.post("/compare", data={"a": "models/base", "b": "--plugin=x.py"}).headers["location"]
    job = client.app.app.state.studio.jobs.get(where.rpartition("/")[2])  # type: ignore[attr-defined]
    assert job.words[:3] == ("diff", "models/base", "./--plugin=x.py")
