"""Calibration data from files, and what observe says about bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from observe_models import saved, tiny_llama, tiny_vit, word_tokenizer
from torch import nn

from weightsmith.core.errors import MissingExtra, OutputError, SourceError, WeightsmithError
from weightsmith.io.read.stats import StatsSource
from weightsmith.observe.collect import observe
from weightsmith.observe.data import Example, batches, read_examples
from weightsmith.observe.model import LoadedModel, load_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(llama: Path) -> LoadedModel:
    return load_model(llama)


def texts(examples: list[Example]) -> list[str]:
    return [bytes(e.inputs.tolist()).decode() for e in examples]


def test_text_is_cut_into_blocks_of_bytes(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 3 + "xyz")
    found = read_examples(tmp_path / "a.txt", loaded, length=10)
    assert texts(found) == ["0123456789"] * 3 + ["xyz"]


def test_length_is_what_the_model_has_positions_for(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 300)
    assert [len(e.inputs) for e in read_examples(tmp_path / "a.txt", loaded, length=4096)] == [128, 128, 44]


def test_a_folder_of_texts_keeps_files_apart(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert texts(read_examples(tmp_path, loaded, length=8)) == ["one", "two"]


def test_a_choice_is_seeded_and_in_file_order(loaded: LoadedModel, tmp_path: Path) -> None:
    lines = [f"line {i:03d}" for i in range(100)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    first, again, other = (
        texts(read_examples(tmp_path / "d.jsonl", loaded, examples=10, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first == sorted(first)
    assert len(set(first)) == 10


@pytest.mark.parametrize(
    ("row", "field", "text"),
    [
        ({"text": "a"}, None, "a"),
        ({"question": "q", "answer": "a"}, None, "q\na"),
        ({"prompt": "p", "response": "r", "id": 3}, None, "p\nr"),
        ({"text": "a", "body": "b"}, "body", "b"),
    ],
)
def test_fields_of_json_lines(loaded: LoadedModel, tmp_path: Path, row: dict, field: str | None, text: str) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n\n")
    assert texts(read_examples(tmp_path / "d.jsonl", loaded, field=field)) == [text]


def test_line_separators_of_unicode_end_no_json_line(loaded: LoadedModel, tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"  # str.splitlines would cut here
    (tmp_path / "d.jsonl").write_text(f'{{"text": "{text}"}}\r\n{{"text": "d"}}', "utf-8", newline="")
    assert texts(read_examples(tmp_path / "d.jsonl", loaded)) == [text, "d"]


def test_a_tokenizer_and_its_first_token_are_used(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "m")
    word_tokenizer(folder, "the cat sat")
    model = load_model(folder)
    (tmp_path / "a.txt").write_text("the cat sat the dog")
    found = [e.inputs.tolist() for e in read_examples(tmp_path / "a.txt", model, length=3)]
    assert found == [[0, 2, 3], [0, 4, 2], [0, 1]]
    assert read_examples(["cat sat"], model)[0].inputs.tolist() == [0, 3, 4]


def test_padding_is_masked_and_removed_from_given_examples(loaded: LoadedModel) -> None:
    found = read_examples(
        [{"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]}, [5], torch.tensor([1, 2, 3])], loaded
    )
    (batch,) = batches(found, 8)
    assert batch.inputs.tolist() == [[7, 8, 0], [5, 0, 0], [1, 2, 3]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert [len(b.inputs) for b in batches(found, 2)] == [2, 1]


def test_images_are_scaled_and_get_a_channel_axis(tmp_path: Path) -> None:
    model = LoadedModel(tiny_vit(), "image-classification", "vit", load_model(tiny_vit()).names)
    grey = np.full((2, 8, 8), 255, np.uint8)
    np.savez(tmp_path / "d.npz", x_train=grey, y_train=np.array([1, 0]))
    found = read_examples(tmp_path / "d.npz", model)
    assert [e.label for e in found] == [1, 0]
    assert torch.equal(found[0].inputs, torch.ones(1, 8, 8))
    np.savez(tmp_path / "f.npz", x=np.full((1, 8, 8, 1), 3.0), y=np.array([2]))
    assert torch.equal(read_examples(tmp_path / "f.npz", model)[0].inputs, torch.full((1, 8, 8), 3.0))
    np.savez(tmp_path / "h.npz", photos=grey, x=np.zeros((1, 8, 8)))
    assert len(read_examples(tmp_path / "h.npz", model, field="photos")) == 2
    np.savez(tmp_path / "g.npz", x=np.zeros((1, 9, 9), np.uint8))
    with pytest.raises(SourceError, match=r"images of \(9, 9\) pixels for a model of 8 x 8"):
        read_examples(tmp_path / "g.npz", model)


def test_image_files_need_pillow_or_are_read(tmp_path: Path) -> None:
    model = load_model(tiny_vit())
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises((MissingExtra, SourceError), match=r"pillow|not a readable image"):
        read_examples(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", "x", r"a\.csv: unknown kind of data; use \.txt, \.jsonl, \.npz"),
        ("a.jsonl", '{"text": "a"}\n{bad', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]", r"line 1: list instead of an object"),
        ("a.jsonl", '{"txt": "a"}', r"line 1: no known text field among txt; name it with --field"),
        ("a.jsonl", "\n", r"a\.jsonl: no example in it"),
        ("a.npz", "junk", r"image or sound data, but .* reads text"),
        ("a.txt", "", r"a\.txt: no example in it"),
    ],
)
def test_bad_files(loaded: LoadedModel, tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=text):
        read_examples(tmp_path / name, loaded)


def test_other_bad_data(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder of calibration data"):
        read_examples(tmp_path / "none.txt", loaded)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(SourceError, match="no text in field 'bdy'; did you mean 'body'"):
        read_examples(tmp_path / "a.jsonl", loaded, field="bdy")
    with pytest.raises(SourceError, match="without a batch axis"):
        read_examples([torch.zeros(2, 3, dtype=torch.int64)], loaded)
    (tmp_path / "x.npz").write_text("junk")
    with pytest.raises(SourceError, match=r"x\.npz: not a readable \.npz file"):
        read_examples(tmp_path / "x.npz", load_model(tiny_vit()))
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    with pytest.raises(WeightsmithError, match="not readable as UTF-8"):
        read_examples(tmp_path / "latin.txt", loaded)


def test_a_vocabulary_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    folder = saved(tiny_llama(vocabulary=300), tmp_path / "m")
    with pytest.raises(SourceError, match="no tokenizer files beside a vocabulary of 300"):
        observe(folder, ["text"], ["gram"], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stats": ["grm"]}, "statistic 'grm' is not known; did you mean 'gram'"),
        ({"stats": []}, "no statistic asked for; known: gram, fisher"),
        ({"examples": 0}, "examples = 0 must be at least 1"),
        ({"layers": (2, 1)}, r"layers = \(2, 1\) is not a range of blocks"),
        ({"kind": "causal"}, "kind = 'causal' is not known; did you mean 'causal-lm'"),
        ({"fisher": "exakt"}, "fisher = 'exakt' is not known; did you mean 'exact'"),
        ({"device": "gpu"}, "device = 'gpu' is not known; use auto, cpu or cuda"),
        ({"layers": (7, 9)}, "no linear layer"),
    ],
)
def test_bad_options(llama: Path, tmp_path: Path, options: dict, text: str) -> None:
    given = {"stats": ["gram"], **options}
    with pytest.raises(WeightsmithError, match=text):
        observe(llama, ["abc"], given.pop("stats"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a model folder"):
        observe(tmp_path / "none", ["abc"], ["gram"], tmp_path / "out")
    with pytest.raises(SourceError, match=r"no config\.json"):
        observe(tmp_path, ["abc"], ["gram"], tmp_path / "out")
    with pytest.raises(SourceError, match=r"Sequential.*pass kind="):
        observe(nn.Sequential(nn.Linear(2, 2)), [[1.0, 2.0]], ["gram"], tmp_path / "out")
    (tmp_path / "config.json").write_text('{"architectures": ["StrangeModel"], "model_type": "bert"}')
    with pytest.raises(SourceError, match=r"'StrangeModel'.*pass kind="):
        observe(tmp_path, ["abc"], ["gram"], tmp_path / "out")
    (tmp_path / "config.json").write_text('{"architectures": ["XForCausalLM"], "model_type": "unheard_of"}')
    with pytest.raises(SourceError, match="transformers cannot load it"):
        observe(tmp_path, ["abc"], ["gram"], tmp_path / "out")


def test_a_checkpoint_that_lacks_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"would be random \(missing_keys: model\.norm\.weight\)"):
        load_model(tmp_path)


def test_results_are_not_overwritten_unasked(llama: Path, tmp_path: Path) -> None:
    out = observe(llama, ["abc"], ["gram", "fisher"], tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["fisher.safetensors", "gram.safetensors"]
    with pytest.raises(OutputError, match=r"gram\.safetensors exists"):
        observe(llama, ["abcd"], ["gram"], out)
    assert StatsSource(out / "gram.safetensors").origin.metadata["rows"] == 3
    observe(llama, ["abcd"], ["gram"], out, overwrite=True)
    assert StatsSource(out / "gram.safetensors").origin.metadata["rows"] == 4


def test_the_story_of_a_statistic(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    seen: list[tuple[str, int, int]] = []
    out = observe(
        llama, tmp_path / "a.txt", ["gram"], tmp_path / "o", length=4, batch=2, progress=lambda *a: seen.append(a)
    )
    story = StatsSource(out / "gram.safetensors").origin.metadata
    assert (story["model"], story["data"]) == (str(llama), str(tmp_path / "a.txt"))
    assert (story["kind"], story["length"], story["examples"], story["rows"]) == ("causal-lm", 4, 3, 10)
    assert story["version"]
    assert seen == [("gram", 2, 3), ("gram", 3, 3)]
