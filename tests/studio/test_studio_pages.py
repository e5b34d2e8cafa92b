"""Pages over HTTP: what is shown, and what the form and the YAML do to each other."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from studio_kit import write_model

from weightsmith.core.method import registered
from weightsmith.recipe.schema import Output, Recipe
from weightsmith.studio.form import form, parameters_of

PATH = "blend.yaml"


def sent(client: TestClient, where: str, text: str, **more: Any) -> str:
    """Send a change of the recipe; the text that the form makes of it."""
    answer = client.post(f"/recipe/{where}", data={"path": PATH, "yaml": text, **more})
    assert answer.status_code == 200, answer.text
    assert answer.headers["hx-trigger-after-swap"] == "planned"
    found = re.search(r"<textarea[^>]*>\n?(.*?)</textarea>", answer.text, re.DOTALL)
    return html.unescape(found[1]) if found else text


def planned(client: TestClient, out: str = "") -> str:
    return html.unescape(client.get("/recipe/plan", params={"path": PATH, "out": out}).text)


def test_the_models_are_listed_with_what_is_known_of_them(client: TestClient, folder: Path) -> None:
    (folder / "models/math/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    shown = client.get("/models").text
    for text in ("models/base", "models/math", "LlamaForCausalLM", "float32", "apache-2.0", "blend.yaml"):
        assert text in shown
    detail = client.get("/model", params={"path": "models/math"}).text
    assert "model.layers.2.mlp.up_proj.weight" in detail
    assert "16×16" in detail


def test_models_that_cannot_be_opened_say_so_and_no_more(client: TestClient, folder: Path) -> None:
    (folder / "models/math/model.safetensors").write_bytes(b"\xff" * 200)
    shown = client.get("/model", params={"path": "models/math"}).text
    assert "not a safetensors file" in shown
    assert "<dt>tensors</dt>" not in shown


def test_a_lone_file_in_the_first_folder_goes_by_its_name(client: TestClient, folder: Path) -> None:
    write_model(folder / "loose", 8)
    (folder / "loose/model.safetensors").rename(folder / "alone.safetensors")
    assert "?path=alone.safetensors" in client.get("/models").text


def test_long_tables_come_a_page_at_a_time(client: TestClient, folder: Path) -> None:
    write_model(folder / "models/many", 9, layers=150, size=1)
    first = client.get("/model", params={"path": "models/many"}).text
    assert first.count("up_proj") + first.count("q_proj") == 100
    found = client.get("/model", params={"path": "models/many", "q": "layers.149. up"}, headers={"hx-request": "true"})
    assert found.text.count("mlp.up_proj") == 1
    assert "<html" not in found.text
    last = client.get("/model", params={"path": "models/many", "first": "99999", "sort": "0"}).text
    assert "201 to 300" in last


def test_every_field_of_the_grammar_and_every_parameter_is_in_the_form() -> None:
    made = form({"models": {"a": "x"}, "rules": [{}]})
    keys = {tuple(json.loads(field.key)) for field in made.settings}
    own = {"base", "models", "method", "parameters", "rules", "output"}
    assert keys == {(name,) for name in set(Recipe.model_fields) - own} | {("output", n) for n in Output.model_fields}
    assert made.rules[0][1]
    for name, cls in registered().items():
        (stage,) = form({"method": name}).stages
        assert [field.label for field in stage.fields] == [p.name for p in cls.parameters()]
        assert all(field.help for field in stage.fields)
    assert {p.name for p in parameters_of("dare_ties")} > {"density", "scope"}


def test_the_form_changes_the_yaml_and_keeps_what_is_not_its_own(client: TestClient, folder: Path) -> None:
    text = (folder / PATH).read_text()
    text = sent(client, "set", text, key='["stage", 0, "density"]', value="0.3")
    assert text == (folder / PATH).read_text() + "parameters:\n  density: 0.3\n"
    text = sent(client, "set", text, key='["models", "math", "weight"]', value="0.7")
    assert "  math:\n    model: models/math\n    weight: 0.7\n" in text
    text = sent(client, "set", text, key='["models", "math", "weight"]', value="")
    text = sent(client, "set", text, key='["stage", 0, "density"]', value="")
    assert text == (folder / PATH).read_text()
    text = sent(client, "set", text, key='["output", "dtype"]', value="bfloat16")
    assert text.endswith("output:\n  dtype: bfloat16\n")
    text = sent(client, "stage", text, do="add-stage")
    assert "method: [dare, ties]" in text or "method:\n  - dare\n  - ties" in text
    text = sent(client, "set", text, key='["stage", 0, "density"]', value="0.5")
    assert "dare: {density: 0.5}" in text
    assert "Ready" in planned(client)
    text = sent(client, "stage", text, do="remove-stage", index="0")
    text = sent(client, "rule", text, do="add-rule")
    text = sent(client, "rule", text, do="add-rule")
    assert text.count("keep") == 2
    text = sent(client, "rule", text, do="remove-rule", index="1")
    text = sent(client, "rule", text, do="remove-rule", index="0")
    assert "rules" not in text
    assert text.startswith("# kept\n")


def test_models_are_added_renamed_and_removed(client: TestClient, folder: Path) -> None:
    text = sent(client, "model", "models: {}\nmethod: ties\n", do="add-model", model="models/math")
    text = sent(client, "model", text, do="add-model", model="models/code")
    text = sent(client, "model", text, do="add-model", model="models/code")
    text = sent(client, "model", text, do="set-base", model="models/base")
    assert text == (
        "models:\n  math: models/math\n  code: models/code\n  code-2: models/code\nmethod: ties\nbase: models/base\n"
    )
    assert "the same model as" in planned(client)
    text = sent(client, "model", text, do="remove-model", name="code-2")
    assert "Ready to run" in planned(client)
    text = text.replace("models/math\n", "models/math  # mine\n")
    text = sent(client, "model", text, do="rename-model", name="math", value="2")
    assert text == "models:\n  '2': models/math   # mine\n  code: models/code\nmethod: ties\nbase: models/base\n"
    text = sent(client, "model", text, do="rename-model", name="2", value="sums")
    answer = client.post(
        "/recipe/model", data={"path": PATH, "yaml": text, "do": "rename-model", "name": "sums", "value": "code"}
    )
    assert answer.status_code == 400
    assert "there already" in answer.text


def test_a_further_stage_leaves_parameters_with_the_first(client: TestClient, folder: Path) -> None:
    text = (folder / PATH).read_text() + "parameters: {density: 0.4, lambda: 0.5}\n"
    text = sent(client, "stage", text, do="add-stage", index="0")
    assert text.endswith("method: [dare, ties: {density: 0.4}]\nparameters: {lambda: 0.5}\n")
    assert "Ready to run" in planned(client)


def test_a_models_own_values_outlive_another_path(client: TestClient, folder: Path) -> None:
    text = "models:\n  math: {model: models/math, weight: 0.5}\nmethod: ties\n"
    key = form(_tree(text)).models[0].path.key
    assert "math: {model: models/code, weight: 0.5}" in sent(client, "set", text, key=key, value="models/code")


def test_slices_are_shown_where_a_path_would_be(client: TestClient, folder: Path) -> None:
    tree = _tree("models: {a: {slices: [{model: x, layers: [0, 2]}]}}")
    assert form(tree).models[0].path.value == "{slices: [{model: x, layers: [0, 2]}]}"


def test_models_called_by_numbers_are_removed_too(client: TestClient, folder: Path) -> None:
    text = sent(client, "model", "models: {1: models/math, 2: models/code}\nmethod: ties\n",
                do="remove-model", name="1")  # fmt: skip
    assert _tree(text)["models"] == {"2": "models/code"}


def _tree(text: str) -> Any:
    from weightsmith.recipe.reader import read

    return read(text, "text").tree


def test_a_problem_appears_beside_the_form_and_vanishes(client: TestClient, folder: Path) -> None:
    text = (folder / PATH).read_text()
    text = sent(client, "set", text, key='["stage", 0, "density"]', value="3")
    assert "1 problem" in planned(client)
    assert "density = 3 is outside (0, 1]" in planned(client)
    sent(client, "set", text, key='["stage", 0, "density"]', value="0.3")
    shown = planned(client, "out")
    assert "Ready to run" in shown
    for text in ("memory", "writes", "disk", "merged by ties"):
        assert text in shown
    sent(client, "yaml", "models: [")
    assert "not valid YAML" in planned(client)
    assert "returns as soon as the YAML can be read" in client.get("/recipe", params={"path": PATH}).text


def test_a_ramp_is_shown_where_the_value_is_a_list(client: TestClient, folder: Path) -> None:
    text = sent(client, "set", (folder / PATH).read_text(), key='["stage", 0, "density"]', value="[0.1, 0.9]")
    assert "density: [0.1, 0.9]" in text
    assert 'data-values="[0.1, 0.9]"' in client.get("/recipe", params={"path": PATH}).text


def test_what_is_typed_outlives_the_page_and_is_saved_when_asked(client: TestClient, folder: Path) -> None:
    before = (folder / PATH).read_text()
    ground = re.search(r'name="ground" value="(\w+)"', client.get("/recipe", params={"path": PATH}).text)
    assert ground
    sent(client, "yaml", before + "seed: 7\n", ground=ground[1])
    assert (folder / PATH).read_text() == before
    page = client.get("/recipe", params={"path": PATH}).text
    assert "seed: 7" in page
    assert "not saved yet" in page
    client.post("/recipe/save", data={"path": PATH, "yaml": before + "seed: 7\n", "ground": ground[1]})
    assert (folder / PATH).read_text() == before + "seed: 7\n"
    assert "not saved yet" not in client.get("/recipe", params={"path": PATH}).text
    sent(client, "yaml", "seed: 8\n")
    client.post("/recipe/revert", data={"path": PATH})
    assert "seed: 8" not in client.get("/recipe", params={"path": PATH}).text


def test_chosen_models_make_a_new_recipe(client: TestClient, folder: Path) -> None:
    answer = client.post("/recipe/add", data={"recipe": "", "path": ["models/math", "models/code"]})
    assert answer.headers["location"] == "/recipe?path=recipe.yaml"
    page = client.get("/recipe", params={"path": "recipe.yaml"}).text
    assert "math: models/math" in page
    assert "recipe.yaml" in client.get("/models").text  # though it is not saved
    assert client.get("/recipe").headers["location"] == "/recipe?path=recipe-2.yaml"


@pytest.mark.parametrize("name", ["ties", "dare_ties", "task_arithmetic"])
def test_methods_say_when_to_use_them(client: TestClient, name: str) -> None:
    page = client.get(f"/methods/{name}").text
    assert "Use it when" in page
    assert "You want to " in page
    assert name in client.get("/methods").text


def test_an_unknown_method_page_names_the_nearest(client: TestClient) -> None:
    assert "did you mean" in client.get("/methods/tise").text
    assert client.get("/nowhere").status_code == 404


def cached_model(hub: Path, id: str) -> Path:
    """A model as the hub's cache holds it: links into a folder of blobs."""
    home = hub / f"models--{id.replace('/', '--')}"
    made = write_model(home / "blobs", 9)
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    snapshot = home / "snapshots/0123"
    snapshot.mkdir(parents=True)
    for file in made.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (home / "refs").mkdir()
    (home / "refs/main").write_text("0123")
    return snapshot


def test_the_hubs_cache_is_shown_and_goes_into_recipes(
    client: TestClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    cached_model(hub, "org/tiny")
    strange = cached_model(hub, "org/strange")
    for file in strange.iterdir():
        file.unlink()
        file.symlink_to(folder.parent / "elsewhere" / file.name)
    write_model(folder.parent / "elsewhere", 3)
    (hub / "models--org--empty").mkdir()
    (hub / "datasets--org--data").mkdir()
    page = client.get("/models").text.partition("In the hub's cache")[2]
    for text in ("org/tiny", "mit", "LlamaForCausalLM", "float32"):
        assert text in page
    for text in ("org/strange", "org/empty", "org/data"):
        assert text not in page
    text = sent(client, "model", "models: {}\nmethod: linear\n", do="add-model", model="org/tiny")
    assert _tree(text)["models"] == {"tiny": "org/tiny"}
    (folder / "sub").mkdir()
    answer = client.post("/recipe/add", data={"recipe": "sub/r.yaml", "path": ["org/tiny", "models/math"]})
    assert answer.status_code == 303
    assert "tiny: org/tiny" in client.get("/recipe", params={"path": "sub/r.yaml"}).text
    other = client.post("/recipe/add", data={"recipe": "sub/r.yaml", "path": ["org/other"]})  # is not there: a path
    assert "org/other" in html.unescape(client.get("/recipe", params={"path": "sub/r.yaml"}).text)
    assert other.status_code == 303


def test_the_form_knows_how_many_blocks_there_are(client: TestClient, folder: Path) -> None:
    assert 'data-blocks="3"' in client.get("/recipe", params={"path": PATH}).text
    for base in ("../x", "'a\0b'", "/etc", "models/none", "[1]", "{model: 3}"):
        text = f"base: {base}\nmodels: {{a: {base}}}\nmethod: ties\n"
        client.post("/recipe/yaml", data={"path": PATH, "yaml": text})
        page = client.get("/recipe", params={"path": PATH})
        assert page.status_code == 200
        assert 'data-blocks="3"' not in page.text


@pytest.mark.parametrize(
    ("text", "meant"),
    [("models/mth", "models/math"), ("maths", "models/math"), ("model/code", "models/code"),
     ("Models/Code/", "models/code"), ("./models/bse", "models/base"), ("org/tinny", "org/tiny")],
)  # fmt: skip
def test_a_mistyped_model_names_the_nearest_that_is_known(
    client: TestClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, meant: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cached_model(tmp_path / "hub", "org/tiny")
    hint = f"x: {text}: no such model; did you mean {meant!r}?"
    recipe = f"models: {{x: {text}, y: models/base}}\nmethod: linear\n"
    sent(client, "yaml", recipe)
    assert "1 problem" in planned(client)
    assert hint in planned(client)
    if "rg/" not in text and text != "model/code":  # those may be on the hub, from where a job would fetch them
        (folder / PATH).write_text(recipe)
        client.post("/recipe/revert", data={"path": PATH})
        grid = {"key1": "models.x.weight", "values1": "0.1, 0.2"}
        for where in ("/recipe/run", "/inspect", "/grid"):
            answer = client.post(where, data={"path": PATH, "out": "out", **grid})
            assert answer.status_code == 400
            assert hint in html.unescape(answer.text)
    if not meant.startswith("org"):
        for answer in (
            client.post("/compare", data={"a": "models/base", "b": text}),
            client.get("/model", params={"path": text}),
        ):
            assert answer.status_code == 400
            assert f"there is no such model; did you mean {meant!r}?" in html.unescape(answer.text)
    assert "Nothing has run yet" in client.get("/run").text


def test_a_mistyped_recipe_names_the_nearest(client: TestClient) -> None:
    grid = {"out": "x", "key1": "parameters.density", "values1": "0.1, 0.2"}
    for answer in (
        client.get("/grid", params={"path": "blnd.yaml"}),
        client.post("/grid", data={"path": "blnd.yaml", **grid}),
        client.post("/inspect", data={"path": "blnd.yaml"}),
    ):
        assert answer.status_code == 400
        assert "no such recipe file; did you mean" in answer.text


MERGEKIT = """# mine
merge_method: ties
base_model: models/base
models:
  - {model: models/math, parameters: {weight: 0.5, density: 0.4}}
  - {model: models/code, parameters: {weight: 0.5, density: 0.4}}
"""


def test_a_config_of_mergekit_runs_as_it_is_or_becomes_a_recipe(client: TestClient, folder: Path) -> None:
    """Its fields are not those of the form, which would show none of them, and would add to them."""
    (folder / PATH).write_text(MERGEKIT)
    page = client.get("/recipe", params={"path": PATH}).text
    assert "a config of mergekit" in page
    assert "Base model" not in page
    assert "Ready to run" in planned(client)
    for where, asked in (
        ("set", {"key": '["seed"]', "value": "1"}),
        ("model", {"do": "set-base", "model": "models/math"}),
    ):
        answer = client.post(f"/recipe/{where}", data={"path": PATH, "yaml": MERGEKIT, **asked})
        assert (answer.status_code, "a config of mergekit" in answer.text) == (400, True)
    text = sent(client, "native", MERGEKIT)
    assert "method: {ties: {scope: tensor, zero_sign: plus}}" in text
    assert "density: 0.4" in text
    assert "Ready to run" in planned(client)
    assert "Base model" in client.get("/recipe", params={"path": PATH}).text
    assert (folder / PATH).read_text() == MERGEKIT  # until it is saved


def test_commands_are_quoted_for_a_shell(client: TestClient, folder: Path) -> None:
    (folder / PATH).rename(folder / "my $(blend).yaml")
    page = html.unescape(client.get("/recipe", params={"path": "my $(blend).yaml"}).text)
    assert "weightsmith merge 'my $(blend).yaml' 'my $(blend)-merged'" in page


def test_the_plan_knows_whether_a_folder_may_be_replaced(client: TestClient, folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "there/notes.txt").write_text("mine")
    assert "exists and is not empty" in planned(client, "there")
    there = client.get("/recipe/plan", params={"path": PATH, "out": "there", "overwrite": "yes"}).text
    assert "Ready to run" in there


def test_a_grid_goes_where_nothing_is_yet(client: TestClient, folder: Path) -> None:
    assert 'name="out" value="blend-grid"' in client.get("/grid").text
    (folder / "blend-grid").mkdir()
    assert 'name="out" value="blend-grid-2"' in client.get("/grid").text
