"""The model card, read back as the hub reads it."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from ruamel.yaml import YAML
from safetensors.torch import save_file

from weightsmith.io.package.card import CardModel, Citation, about, licence_problems, licences, model_card
from weightsmith.jobs.recipe import Recipe

MODELS = [CardModel("math", "org/math", {"weight": 0.5, "density": 0.2}), CardModel("code")]
RECIPE = {
    "base": "/home/alice/models/base",
    "models": {"math": "org/math", "code": {"model": "~/runs/code|x", "weight": 0.5}},
    "method": ("dare", "ties"),
    "parameters": {"lambda": 1.0, "no": None, "text": "on"},
}


def card(**changes):
    fields = {
        "title": "merged",
        "models": MODELS,
        "base": CardModel("base", "org/base"),
        "method": "Trim and elect.",
        "recipe": RECIPE,
        "licences": {"base": "apache-2.0", "math": "apache-2.0", "code": "apache-2.0"},
        "citations": [Citation("ties", "arXiv:2306.01708")] * 2,
        "version": "0.1.0",
    }
    return model_card(**{**fields, **changes})


def test_front_matter_as_the_hub_reads_it():
    data = ModelCard(card()).data.to_dict()
    assert data == {
        "base_model": ["org/base", "org/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "weightsmith"],
        "license": "apache-2.0",
    }


def test_no_local_folder_name_is_told():
    text = card(base=CardModel("base"), models=[CardModel("a"), CardModel("b")])
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "alice" not in text
    assert "runs" not in text


def test_the_body_tells_how_it_was_made():
    text = ModelCard(card()).text
    for part in ("Trim and elect.", "weightsmith merge recipe.yaml", "2 models with weightsmith 0.1.0"):
        assert part in text
    assert "| math | [org/math](https://huggingface.co/org/math) | weight = 0.5, density = 0.2 | apache-2.0 |" in text
    assert "| code | local |  | apache-2.0 |" in text
    assert text.count("[arXiv:2306.01708](https://arxiv.org/abs/2306.01708)") == 1
    block = text.split("```yaml\n")[1].split("```")[0]
    recipe = YAML(typ="safe", pure=True).load(block)
    assert list(recipe["models"]) == ["math", "code"]
    assert recipe["models"]["code"]["model"] == "code|x"
    assert recipe["base"] == "base"
    assert recipe["method"] == ["dare", "ties"]
    assert recipe["parameters"] == RECIPE["parameters"]


@pytest.mark.parametrize(
    ("stated", "fields"),
    [
        ({"a": "mit", "b": "mit"}, {"license": "mit"}),
        ({"a": "mit", "b": "apache-2.0"}, {"license": "other", "license_name": "see-the-parts"}),
        ({"a": "mit", "b": "unknown"}, {"license": "other", "license_name": "see-the-parts"}),
        ({"a": "unknown", "b": "unknown"}, {"license": "unknown"}),
        ({"a": "other (qwen-research)"}, {"license": "other", "license_name": "qwen-research"}),
        ({"a": "My \"own\": licence\n- x"}, {"license": "other"}),
        ({}, {"license": "unknown"}),
    ],
)  # fmt: skip
def test_licence_fields(stated, fields):
    data = ModelCard(card(licences=stated)).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == fields


def test_unlike_licences_are_noted_in_the_body():
    text = card(licences={"base": "mit", "math": "cc-by-nc-4.0"})
    assert "the merge is bound by all of them" in text
    assert "math (cc-by-nc-4.0) may not be used commercially" in text
    assert "## Licence" not in card()


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Hi", "mit"),
        ("---\r\nlicense: gemma\r\n---\r\n", "gemma"),
        ("---\nlicense: [mit, bsd]\n---", "mit + bsd"),
        ("---\nlicense: other\nlicense_name: acme\n---\n", "other (acme)"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [x]\n---\n", "unknown"),
        ("# no front matter\n---\nlicense: mit\n---\n", "unknown"),
        ("---\nlicense: [mit\n---\n", "unknown"),
        ("---\nlicense: mit\nlicense: bsd\n---\n", "unknown"),
        ("---\n- license\n---\n", "unknown"),
        ("---\n!!python/object/apply:os.system ['echo']\n---\n", "unknown"),
        ("---\n" + "[" * 600 + "\n---\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_licences_are_read_from_the_inputs_cards(tmp_path, front, licence):
    (tmp_path / "README.md").write_bytes(front.encode())
    assert licences({"a": tmp_path, "b": None, "c": tmp_path / "none"}) == {
        "a": licence,
        "b": "unknown",
        "c": "unknown",
    }


@pytest.mark.parametrize(
    ("stated", "texts"),
    [
        ({"a": "mit", "b": "mit"}, []),
        ({"a": "mit", "b": "apache-2.0"}, []),
        ({"a": "cc-by-nc-4.0", "b": "cc-by-nc-4.0"}, []),
        ({"a": "cc-by-nc-sa-4.0", "b": "mit"}, [r"^a \(cc-by-nc-sa-4\.0\) may not be used commercially"]),
        ({"a": "other (x-research)", "b": "mit"}, [r"^a \(other \(x-research\)\) may not be used commercially"]),
        ({"a": "llama3.1", "b": "gemma", "c": "mit"}, [r"^a \(llama3\.1\), b \(gemma\) are community licences"]),
        ({"a": "llama3.1", "b": "llama3.1", "c": "mit"}, []),
        ({"a": "cc-by-nd-4.0"}, [r"^a \(cc-by-nd-4\.0\) allows no derived works"]),
        ({"a": "mit", "b": "unknown"}, ["^no licence is stated by b; ask its author before"]),
        ({"a": "mit", "b": "unknown", "c": "unknown"}, ["^no licence is stated by b, c; ask their authors before"]),
    ],
)
def test_licence_problems(stated, texts):
    import re

    problems = licence_problems(stated)
    assert len(problems) == len(texts), problems
    assert all(re.search(text, problem.text) for text, problem in zip(texts, problems, strict=True))


def test_a_sentence_encoder_stays_one(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: transformers\ntags: [feature-extraction, sentence-similarity, 'loss:Softmax', sft]\n"
        "pipeline_tag: sentence-similarity\n---\n"
    )
    (tmp_path / "modules.json").write_text("[]")
    found = about(tmp_path, tmp_path)
    assert found == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity"],
    }
    data = ModelCard(card(about=found)).data.to_dict()
    assert data["library_name"] == "sentence-transformers"
    assert data["tags"] == [*found["tags"], "merge", "weightsmith"]
    assert data["pipeline_tag"] == "sentence-similarity"


@pytest.mark.parametrize(
    ("files", "library"),
    [
        ({}, "pytorch"),
        ({"config.json": "{}"}, "transformers"),
        ({"config.json": "{}", "README.md": "---\nlibrary_name: setfit\n---\n"}, "setfit"),
        ({"config.json": "{}", "README.md": "---\nlibrary_name: peft\n---\n"}, "transformers"),
        ({"config.json": "{}", "README.md": "---\nlibrary_name: 'a <b> c'\n---\n"}, "transformers"),
    ],
)
def test_the_library_is_that_of_the_model_it_takes_the_place_of(files, library, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert about(tmp_path, tmp_path)["library_name"] == library


def test_how_many_models_it_was_made_of():
    said = [
        card(models=MODELS[:1]),
        card(models=MODELS[:1], base=None),
        card(models=MODELS),
        card(models=MODELS, stacked=2),
    ]
    for text, words in zip(said, ["made from one model and its base", "made from one model", "merged from 2 models",
                                  "put together from parts of 2 models"], strict=True):  # fmt: skip
        assert f"This model was {words} with weightsmith 0.1.0." in text


def test_the_same_bytes_come_from_the_paths_as_they_were():
    cut = "gives the same bytes, once the folders are written out (above they are cut to their last names); `weights"
    assert cut in card()
    assert "gives the same bytes; `weightsmith.json`" in card(recipe={"models": {"a": "org/a"}, "method": "average"})


def test_licences_of_all_that_a_model_is_made_of(tmp_path):
    """A stack, and a nested recipe: not the first part's alone, whose files go along."""
    for name, licence in (("a", "mit"), ("b", "cc-by-nc-4.0"), ("c", "apache-2.0")):
        (tmp_path / name).mkdir()
        layers = {f"model.layers.{i}.up.weight": torch.ones(2, 2) for i in range(2)}
        save_file(layers, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"num_hidden_layers": 2}')
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")

    def made(tree, out):
        (tmp_path / "r.json").write_text(json.dumps(tree))
        return Recipe.load(tmp_path / "r.json").run(tmp_path / out)

    nested = {"models": {"x": "a", "y": "b"}, "method": "average"}
    slices = [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [0, 1]}, {"model": "a", "layers": [1, 2]}]
    tree = {"models": {"stack": {"slices": slices}}, "method": "passthrough"}
    result = made(tree, "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "put together from parts of 2 models" in card
    assert "| stack, part 1 (a) | local |  | mit |\n| stack, part 2 (b) | local |  | cc-by-nc-4.0 |\n" in card
    assert any("stack, part 2 (b) (cc-by-nc-4.0) may not be used commercially" in str(w) for w in result.warnings)
    tree = {"models": {"both": {"model": nested}, "z": "c"}, "method": "average"}
    made(tree, "two")
    card = (tmp_path / "two/README.md").read_text()
    assert "merged from 2 models" in card
    assert [line.split("|")[1].strip() for line in card.splitlines() if line.count("|") == 5][2:] == [
        "both, part 1 (a)", "both, part 2 (b)", "z",
    ]  # fmt: skip
