"""Splits are disjoint, the lenses do what they are called, windows carry their tag."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from demo.corpus import READERS, SHORTEST, SOURCES, SPLITS, documents, split_by_document
from demo.digits import LENSES, batches, splits
from demo.text import TAGS, windows


def test_the_digits_splits_are_disjoint_and_cover_everything() -> None:
    from sklearn.datasets import load_digits

    # Images are told apart by their bytes; the data set itself has no two equal images.
    parts = {name: {image.numpy().tobytes() for image in part.images} for name, part in splits(0).items()}
    assert all(not parts[a] & parts[b] for a, b in combinations(parts, 2))
    assert sum(map(len, parts.values())) == len(load_digits().target) == 1797
    assert set(parts) == set(SPLITS)


def test_the_digits_splits_depend_on_the_seed_alone() -> None:
    fresh = splits.__wrapped__  # past the cache
    assert torch.equal(fresh(1)["test"].images, fresh(1)["test"].images)
    assert not torch.equal(splits(1)["test"].images, splits(2)["test"].images)


def test_lenses() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8) / 63
    assert torch.equal(LENSES["clean"](image), image)
    assert torch.equal(LENSES["invert"](LENSES["invert"](image)), 1 - (1 - image))
    assert LENSES["invert"](image)[0, 0, 0] == 1
    assert LENSES["rotate 90"](image)[0, 0, 0] == image[0, 0, 7]  # the upper right corner turns to the upper left
    assert torch.equal(LENSES["shift 2"](image)[:, :, 2:], image[:, :, :6])
    assert LENSES["shift 2"](image)[:, :, :2].count_nonzero() == 0
    assert torch.equal(LENSES["flip"](image)[:, :, 0], image[:, :, 7])


def test_batches_repeat_with_their_seed_and_pair_images_with_labels() -> None:
    data = splits(0)["train"]
    images, labels = next(batches(data, ("clean",), 8, seed=5))
    again, _ = next(batches(data, ("clean",), 8, seed=5))
    assert torch.equal(images, again)
    at = [int((data.images == image).all(-1).all(-1).nonzero()[0]) for image in images]
    assert torch.equal(data.labels[at], labels)


def test_a_text_is_in_one_split_only() -> None:
    texts = [f"text {number}" for number in range(30)]
    parts = split_by_document([*texts, *texts])
    assert sorted(sum(parts.values(), ())) == sorted(texts)
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "validation": 5, "test": 5}


@pytest.mark.parametrize("domain", ["JSON", "French"])  # the others read hundreds of files
def test_a_domain_is_found_offline_and_has_enough_text(domain: str) -> None:
    found = list(documents(SOURCES[domain], READERS[domain]))
    parts = split_by_document(found)
    assert all(sum(map(len, parts[name])) > 5_000 for name in SPLITS)
    assert list(documents(SOURCES[domain], READERS[domain])) == found


def test_python_code_comes_without_docstrings_and_english_is_made_of_them(tmp_path: Path) -> None:
    sentence = (
        "Here stands a sentence long enough to be taken for prose, since it has more than a hundred letters in it."
    )
    file = tmp_path / "module.py"
    file.write_text(f'"""{sentence}\n\n>>> 1 + 1\n2\n"""\n\ndef f():\n    """Short."""\n    return "kept"\n', "utf-8")
    (code,) = READERS["Python"](file)
    assert "sentence" not in code
    assert "Short" not in code
    assert code.split() == ["def", "f():", "return", '"kept"']
    assert READERS["English"](file) == (sentence,)


def test_a_catalogue_gives_every_message_once_in_documents_that_are_long_enough(tmp_path: Path) -> None:
    translated = {
        f"message {number}": f"Le message {number} dit {'beaucoup ' * (number % 9)}." for number in range(100)
    }
    catalog = Catalog(locale="fr")
    for message, text in translated.items():
        catalog.add(message, text)
    catalog.add("again", translated["message 3"])  # the same French for another message
    catalog.add("untranslated")
    catalog.add(("a file", "files"), ("un fichier", "des fichiers"))
    file = tmp_path / "some.mo"
    with file.open("wb") as out:
        write_mo(out, catalog)

    found = list(READERS["French"](file))
    lines = "\n".join(found).split("\n")
    assert all(SHORTEST <= len(document) < SHORTEST + 100 for document in found)
    assert len(lines) == len(set(lines))
    assert set(lines) <= {*translated.values(), "un fichier"}
    assert sum(map(len, {*translated.values(), "un fichier"} - set(lines))) < SHORTEST  # only the rest is left out
    assert lines != sorted(lines, key=[*translated.values(), "un fichier"].index)  # shuffled


def test_no_french_message_is_in_two_splits() -> None:
    parts = split_by_document(documents(SOURCES["French"], READERS["French"]))
    lines = [line for texts in parts.values() for line in dict.fromkeys("\n".join(texts).split("\n")) if len(line) > 40]
    assert len(lines) == len(set(lines)) > 300


def test_windows_are_pieces_of_the_texts_behind_the_tag() -> None:
    texts = (bytes(range(100)), b"short")
    rows = windows(texts, TAGS["French"], 6, 20, np.random.default_rng(0))
    assert rows.shape == (6, 20)
    for row in rows:
        assert bytes(row[:4].tolist()) == b"<fr>"
        assert bytes(row[4:].tolist()) in texts[0]
    assert torch.equal(rows, windows(texts, TAGS["French"], 6, 20, np.random.default_rng(0)))
