"""Inspect, Compare, Grid, Fronts and History, over what real commands have left."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from studio_kit import EVIL, HOME, PORT, TOKEN, answered, write_model

from weightsmith.cli.main import main
from weightsmith.studio.app import build
from weightsmith.studio.jobs import Jobs
from weightsmith.studio.measured import measured


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    """A studio that has merged, inspected, compared and swept, each by its own form."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("results")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    patch.setattr(Jobs, "open", lambda jobs: None)  # the commands run here: no process of its own for each
    for seed, name in enumerate(("base", "math", "code")):
        write_model(folder / "models" / name, seed, evil=True)
    (folder / "blend.yaml").write_text(
        "base: models/base\nmodels: {math: models/math, code: models/code}\nmethod: ties\n"
    )
    (folder / "found/recipes").mkdir(parents=True)
    for name in ("recipe.yaml", "recipes/3.yaml", "recipes/9.yaml", "recipes/17.yaml"):
        shutil.copy(folder / "blend.yaml", folder / "found" / name)
    shutil.copy(Path(__file__).with_name("result.json"), folder / "found/result.json")
    app = build((folder,), TOKEN, PORT, evaluator="/of/the/user.py")
    client = TestClient(app, base_url=HOME, follow_redirects=False)
    with client:
        client.get("/", params={"token": TOKEN})
        client.headers["origin"] = HOME
        sent(client, "/recipe/run", "/run/0001", path="blend.yaml", out="merged")
        sent(client, "/inspect", "/inspect/0002", path="blend.yaml", spectra="1024")
        sent(client, "/compare", "/compare/0004", a="models/math", b="merged", c="models/code")
        grid = {
            "key1": "parameters.density",
            "values1": "0.2, 0.5",
            "key2": "models.math.weight",
            "values2": "0.5, 1, 2",
        }
        sent(client, "/grid", "/grid/0005", path="blend.yaml", out="grid", **grid)
        jobs = client.app.app.state.studio.jobs  # type: ignore[attr-defined]
        patch.chdir(folder)
        for job in reversed(jobs.all()):
            answered(job)
        assert {job.state for job in jobs.all()} == {"finished"}
        yield client, folder
    patch.undo()


@pytest.fixture(autouse=True)
def state(studio: tuple[TestClient, Path]) -> None:
    """One key for the whole module: that of the fixture above."""


def sent(client: TestClient, url: str, where: str, /, **form: str) -> None:
    answer = client.post(url, data=form)
    assert (answer.status_code, answer.headers.get("location")) == (303, where), answer.text


def seen(client: TestClient, url: str, /, **query: Any) -> str:
    """A page as people read it; nothing of it is markup of a file."""
    answer = client.get(url, params=query)
    assert answer.status_code == 200, answer.text
    assert EVIL not in answer.text
    assert "<img" not in answer.text
    return html.unescape(re.sub(r"<[^>]+>", " ", answer.text))


def test_an_inspection_is_shown_with_its_advice(studio: tuple[TestClient, Path]) -> None:
    client, _ = studio
    page = seen(client, "/inspect/0002")
    for text in ("Cosines of task vectors", "Sign conflict by layer and role, %", "Singular spectra", "use ties",
                 "weightsmith inspect blend.yaml --json", EVIL, "model.layers.2.mlp.up_proj.weight"):  # fmt: skip
        assert text in page
    assert "<svg" in client.get("/inspect/0002").text
    assert "0002" not in seen(client, "/compare")
    assert "inspect blend.yaml" in seen(client, "/inspect")


def test_advice_goes_into_the_recipe(studio: tuple[TestClient, Path]) -> None:
    client, folder = studio
    text = (folder / "blend.yaml").read_text()
    client.post("/recipe/yaml", data={"path": "blend.yaml", "yaml": text + "parameters: {density: 0.3, sign: count}\n"})
    sent(client, "/recipe/use", "/recipe?path=blend.yaml", path="blend.yaml", method="dare")
    page = client.get("/recipe", params={"path": "blend.yaml"}).text
    assert "method: dare\nparameters: {density: 0.3}" in page  # dare has a density as well, and no sign
    client.post("/recipe/revert", data={"path": "blend.yaml"})


def test_comparisons_stand_side_by_side(studio: tuple[TestClient, Path]) -> None:
    client, _ = studio
    page = seen(client, "/compare/0004")
    for text in ("merged against models/math", "models/code against models/math", "weightsmith diff models/math merged",
                 "How well they do", EVIL):  # fmt: skip
        assert text in page
    told = json.loads((studio[1] / ".weightsmith-studio/jobs/0003/out").read_text())
    assert f"{100 * told['model']['relative']:.3f}%" in page
    largest = max(told["tensors"].items(), key=lambda item: item[1]["relative"])[0]
    table = client.get("/compare/0003", params={"sort": "2"}, headers={"hx-request": "true"}).text
    assert largest in html.unescape(table.partition("<tbody>")[2].partition("</tr>")[0])


@pytest.mark.parametrize(
    ("form", "message"),
    [({"a": "models/math", "b": ""}, "choose two models"), ({"a": "merged", "b": "./merged/"}, "the same model twice"),
     ({"a": "merged", "b": "../x"}, "outside the folders")],
)  # fmt: skip
def test_what_cannot_be_compared(studio: tuple[TestClient, Path], form: dict[str, str], message: str) -> None:
    assert message in studio[0].post("/compare", data=form).text


def test_a_grid_is_one_merge_and_a_table(studio: tuple[TestClient, Path]) -> None:
    client, folder = studio
    page = seen(client, "/grid/0005")
    command = "weightsmith merge blend.yaml grid --set parameters.density=0.2,0.5 --set models.math.weight=0.5,1,2"
    assert command in page
    links = client.get("/grid/0005").text.count("/history/of?path=grid%2Fdensity")
    assert links == len(list((folder / "grid").iterdir())) == 6
    for text in ("parameters.lambda", "models.code.density", "found/recipe.yaml"):
        assert text in seen(client, "/grid", path="blend.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [("0.5", "several values"), ("0.1,,0.2", "an empty value"), (",".join(map(str, range(70))), "at most 64"),
     ("1, 1", "would be called"), ("0.5, x", "is outside (-inf, inf)")],
)  # fmt: skip
def test_values_that_make_no_grid(studio: tuple[TestClient, Path], values: str, message: str) -> None:
    form = {"path": "blend.yaml", "out": "g2", "key1": "parameters.lambda", "values1": values}
    assert message in studio[0].post("/grid", data=form).text


def report(models: dict[str, Any], **more: Any) -> str:
    """What `weightsmith check --json` prints."""
    return json.dumps({"models": models, "problems": [], "notes": [], "missing": {}, "answers": {}, **more})


def test_scores_of_a_grid_become_a_map(studio: tuple[TestClient, Path]) -> None:
    """All cells are scored by one command; one of them could not be."""
    client, folder = studio
    names = sorted(path.name for path in (folder / "grid").iterdir())
    sent(client, "/grid/0005/score", "/grid/0005", score="yes")
    job = jobs_of(client).get("0006")
    assert job.words[:3] == ("check", f"grid/{names[0]}", "--json")
    assert job.words[3:-1] == tuple(f"--beside=grid/{name}" for name in names[1:])
    assert job.words[-1] == "--evaluator=/of/the/user.py"
    assert "measure 6 merges" in seen(client, "/grid/0005")
    figures = {"perplexity": 12.5, "bits_per_byte": 1.1, "tokens": 9}
    found = {f"grid/{names[0]}": figures, f"grid/{names[1]}": {**figures, "perplexity": 11.25}}
    scores = {key: {"<b>sums": 3.0 + i} for i, key in enumerate(found)}
    answered(job, report(found, scores=scores, missing={f"grid/{names[2]}": "no <b>tokenizer"}))
    page = seen(client, "/grid/0005")
    assert "Perplexity: parameters.density down, models.math.weight across" in page
    for text in ("12.5", "11.25", "no <b>tokenizer"):
        assert text in page
    assert "<b>sums: parameters.density down" in seen(client, "/grid/0005", measure="<b>sums")


def jobs_of(client: TestClient) -> Jobs:
    return client.app.app.state.studio.jobs  # type: ignore[attr-defined,no-any-return]


def test_models_are_asked_side_by_side(studio: tuple[TestClient, Path]) -> None:
    """Perplexities, the user's scores and answers come from one command; what models say is text."""
    client, _ = studio
    form = {"prompt": "--plugin=x.py; is\n2?", "chat": "yes", "score": "yes", "evaluator": "/of/a/page.py"}
    sent(client, "/compare/0004/ask", "/compare/0004", **form)
    (job,) = (job for job in jobs_of(client).all() if job.state == "queued")
    assert job.words == ("check", "models/math", "--json", "--beside=merged", "--beside=models/code",
                         f"--prompt={form['prompt']}", "--tokens=64", "--chat",
                         "--evaluator=/of/the/user.py")  # fmt: skip
    part = client.get("/compare/0004", params={"part": "measured"}, headers={"hx-request": "true"}).text
    assert "every 2s" in part
    assert "<html" not in part
    figures = {"perplexity": 4.5, "bits_per_byte": 1.25, "tokens": 3}
    answered(job, report({"models/math": figures, "merged": {}, "models/code": figures},
                         answers={"models/math": EVIL, "models/code": "four"}, notes=["merged: no <i>words"],
                         scores={"models/math": {"sums": 0.75}}))  # fmt: skip
    page = seen(client, "/compare/0004")
    for text in ("“--plugin=x.py; is\n2?”", EVIL, "four", "no answer", "no <i>words", "4.5", "1.25", "0.75"):
        assert text in page
    job = jobs_of(client).add(["check", "merged", "--json"], "check", {"out": "models/math"})
    for text in ("[]", '{"models": [], "problems": [], "notes": []}', "", '{"models": {"merged": 1}}'):
        answered(job, text)
        assert "4.5" in seen(client, "/compare/0004")
    jobs_of(client).remove(job.id)
    job = jobs_of(client).add(["check", "models/new", "--json"], "check", {"out": "models/new"})
    (job.folder / "log").write_text("error: score.py: it defines no scores(model, split)\n")
    (job.folder / "done").write_text('{"code": 2, "ended": 0}')
    for text in ('{"loss": 1}', "loading\n"):  # what an evaluator has printed itself
        (job.folder / "out").write_text(text)
        assert measured([jobs_of(client).get(job.id)])["models/new"].note.endswith("no scores(model, split)")
    jobs_of(client).remove(job.id)


def test_a_prompt_is_not_a_book(studio: tuple[TestClient, Path]) -> None:
    answer = studio[0].post("/compare/0004/ask", data={"prompt": "x" * 20_001})
    assert answer.status_code == 400
    assert "20,001 letters" in answer.text
    assert "no comparison" in studio[0].post("/compare/0002/ask", data={"prompt": "x"}).text


def test_a_front_has_sliders(studio: tuple[TestClient, Path]) -> None:
    client, folder = studio
    assert "nsga2" in seen(client, "/fronts")
    page = seen(client, "/fronts/of", path="found")
    assert "<b>chosen</b> at the edge" in page
    assert "Candidate 9 is chosen" in seen(client, "/fronts/of", path="found", w0="100", w1="0")
    assert "Candidate 17 is chosen" in seen(client, "/fronts/of", path="found", w0="0", w1="100")
    assert "path=found%2Frecipes%2F17.yaml" in client.get("/fronts/of?path=found&w0=0&w1=100").text
    assert "models/math" in seen(client, "/recipe", path="found/recipes/17.yaml")
    (folder / "broken").mkdir()
    (folder / "broken/recipe.yaml").write_text("")
    for text in (
        "{}",
        "[",
        '{"goals": {"a": "max"}, "best": {"scores": {}}, "front": []}',
        "null",
        '{"goals": [["a", "max"]], "best": {"scores": {"a": 1}, "point": {}, "candidate": 1}, "front": [],'
        ' "sampler": "", "candidates": 1, "notes": []}',
    ):
        (folder / "broken/result.json").write_text(text)
        assert client.get("/fronts").status_code == 200
        assert client.get("/fronts/of", params={"path": "broken"}).status_code == 400
    shutil.rmtree(folder / "broken")


def test_history_knows_what_was_made_from_what(studio: tuple[TestClient, Path]) -> None:
    client, _ = studio
    assert "merged" in seen(client, "/history")
    page = seen(client, "/history/of", path="merged")
    for text in ("method: ties", "math: ./models/math", "weightsmith lineage merged", "Rerun and compare the bytes",
                 '"kind": "merge"', '"tensors": "7 of them"'):  # fmt: skip
        assert text in page
    links = client.get("/history/of", params={"path": "merged"}).text.partition('class="tree"')[2]
    assert links.count('<a href="/model?path=models%2F') == 3
    answer = client.post("/history/again", data={"path": "merged"})
    new = answer.headers["location"].partition("=")[2]
    assert "method: ties" in seen(client, "/recipe", path=new)
    assert "Ready to run" in client.get("/recipe/plan", params={"path": new}).text
    assert client.get("/history/of", params={"path": "models"}).status_code == 400


def test_history_follows_nothing_out_of_the_folders(studio: tuple[TestClient, Path], tmp_path: Path) -> None:
    """A manifest from elsewhere may name anything: it is not opened."""
    client, folder = studio
    elsewhere = write_model(tmp_path / "SECRET-place", 3, evil=True)
    text = f"models: {{x: {elsewhere}, y: models/math}}\nmethod: linear\n"
    (folder / "away.yaml").write_text(text)
    assert main(["merge", str(folder / "away.yaml"), str(folder / "away"), "--quiet"]) == 0
    (elsewhere / "weightsmith.json").write_text("this would be told as damaged")
    page = seen(client, "/history/of", path="away")
    assert "elsewhere; not looked at" in page
    assert "damaged" not in page
    for form in ({"out": "away", "rerun": "yes"}, {"out": "away"}):
        answer = client.post("/verify" if "rerun" in form else "/check", data=form)
        assert answer.status_code == 403
        assert "was made from" in answer.text
    new = client.post("/history/again", data={"path": "away"}).headers["location"].partition("=")[2]
    assert "outside the folders" in client.get("/recipe/plan", params={"path": new}).text
    for name in ("away", "away.yaml"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_unlike_models_have_no_figures_that_were_not_measured(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in both, what is not, and a share only of the former; what is small is not nothing."""
    monkeypatch.chdir(folder)
    write_model(folder / "models/wide", 7, size=8)
    write_model(folder / "models/deep", 8, layers=5)
    tensors = load_file(folder / "models/base/model.safetensors")
    (folder / "models/near").mkdir()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-5
    save_file(tensors, folder / "models/near/model.safetensors")
    pages = {}
    for name in ("wide", "deep", "near"):
        where = client.post("/compare", data={"a": "models/base", "b": f"models/{name}"}).headers["location"]
        answered(jobs_of(client).get(where.rpartition("/")[2]))
        pages[name] = seen(client, where)
        assert "0.000%" not in pages[name]
    for text in ("nothing alike", "nothing can be measured", "6 tensors  in both, of other shapes", "16×16, 8×8"):
        assert text in pages["wide"]
    assert "<svg" not in client.get("/compare/0001").text.partition("<main")[2]
    for text in ("differs", "over the 6 tensors that both have", "4 tensors  only in models/deep"):
        assert text in pages["deep"]
    assert re.search(r"\d\.?\de-0\d%", pages["near"])
    assert "None of one name and shape is in both" in pages["wide"]


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "1e3", "²", "9" * 30, "101 "])
def test_numbers_out_of_range_are_refused_in_a_line(studio: tuple[TestClient, Path], text: str) -> None:
    client, _ = studio
    recipe = {"path": "blend.yaml", "yaml": "models: {a: models/math}\nmethod: linear\n"}
    refused = [client.get("/fronts/of", params={"path": "found", name: text}) for name in ("w0", "w1", "x", "y")]
    if text != "101 ":
        pages = ("/model?path=models/base", "/inspect/0002?", "/compare/0003?")
        refused += [client.get(f"{page}&{name}={text}") for page in pages for name in ("first", "sort")]
        refused += [
            client.post(page, data={"path": "blend.yaml", "spectra": text}) for page in ("/inspect", "/recipe/inspect")
        ]
        refused += [
            client.post(f"/recipe/{what}", data={**recipe, "do": f"remove-{what}", "index": text})
            for what in ("stage", "rule")
        ]
    for answer in refused:
        assert answer.status_code == 400, answer.url
        line = re.findall(r"<li>(.*?)</li>", answer.text)
        assert len(line) == 1
        assert "expected" in line[0]
        assert "<nav" in answer.text  # a page as all others
    assert client.get("/run").text.count("inspect blend.yaml") == 1


def test_a_long_prompt_is_shown_by_its_beginning(studio: tuple[TestClient, Path]) -> None:
    """All of it is asked, copied with its command, and there to be opened."""
    client, _ = studio
    prompt = "begin " + "x" * 19_980 + " end"
    sent(client, "/compare/0003/ask", "/compare/0003", prompt=prompt)
    (job,) = (job for job in jobs_of(client).all() if job.state == "queued")
    assert f"--prompt={prompt}" in job.words
    answered(job, report({"models/math": {}, "merged": {}}, answers={"models/math": "a", "merged": "b"}))
    page = client.get("/compare/0003").text
    assert page.count("x" * 19_980) == 2  # in what can be opened, and in what can be copied
    opened = re.search(r"<details><summary>all 19,990 letters of it</summary>(.*?)</details>", page, re.DOTALL)
    assert opened
    assert prompt in opened[1]
    assert sum(prompt in copied for copied in re.findall(r'data-copy="([^"]*)"', page)) == 1
    assert prompt in client.get(f"/run/{job.id}").text
    assert prompt not in re.sub(r'data-copy="[^"]*"', "", client.get(f"/run/{job.id}").text)
    jobs_of(client).remove(job.id)
