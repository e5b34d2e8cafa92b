"""What is printed, written and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from weightsmith.cli.main import main
from weightsmith.core.errors import SourceError
from weightsmith.inspect.show import from_plain, html_page

Captured = pytest.CaptureFixture[str]
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (12, 8),
    "model.norm.weight": (8,),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    base = {n: draw.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    for name in ("base", "math", "code"):
        (tmp_path / name).mkdir()
        moved = 0.0 if name == "base" else 0.02
        tensors = {n: (w + moved * draw.standard_normal(w.shape)).astype(np.float32) for n, w in base.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text("base: base\nmodels: {'<b>math': math, code: code}\nmethod: linear\n")
    return path


def test_tables_and_advice(recipe: Path, capsys: Captured) -> None:
    assert main(["inspect", str(recipe)]) == 0
    shown = capsys.readouterr().out
    for word in (
        "Whole model",
        "Cosines of task vectors",
        "Overlap of top-20% masks",
        "Layers",
        "Roles",
        "interference",
    ):
        assert word in shown
    assert re.search(r"^  code +0\.\d{3} +[12]\.\d\d% ", shown, re.MULTILINE)
    assert "3 tensors, 200 weights, 2 experts\n" in shown
    assert "spectra of 2 matrices, smaller side up to 1024; singular interference " in shown
    assert re.search(r"  - largest \|tau\|/\|base\| = [12]\.\d+% < 5%: .*\[measured on ", shown)
    assert main(["inspect", str(recipe), "--spectra", "0"]) == 0
    shown = capsys.readouterr().out
    assert "no spectra\n" in shown
    assert "effective rank" not in shown
    assert main(["inspect", str(recipe), "--spectra", "4", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_json(recipe: Path, capsys: Captured) -> None:
    assert main(["inspect", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"] == ["<b>math", "code"]
    assert list(found["tensors"]) == list(SHAPES)
    assert list(found["layers"]) == ["0", "1", "norm"]
    assert found["model"]["entries"] == 200
    assert len(found["model"]["cosine"]) == 2
    assert found["tensors"]["model.norm.weight"]["spectra"] is None
    assert len(found["model"]["spectra"]["curve"][0]) == 33
    assert {"text", "methods", "rule", "value", "source"} == set(found["advice"][0])


def test_embeddings_of_unlike_vocabularies_are_left_out(recipe: Path, capsys: Captured) -> None:
    for number, name in enumerate(("base", "math", "code")):
        words = {"yes": number // 2, "no": 1 - number // 2}
        (recipe.parent / name / "vocab.json").write_text(json.dumps(words))
        table = {"model.embed_tokens.weight": np.ones((2, 8), np.float32), "w": np.full(4, number, np.float32)}
        save_file(table, recipe.parent / name / "model.safetensors")
    assert main(["inspect", str(recipe)]) == 0
    assert "not looked at: model.embed_tokens.weight (unlike vocabulary in code: 2 tokens" in capsys.readouterr().out


def test_the_page_needs_nothing_else(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(recipe), "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"\nwrote {page}\n")
    text = page.read_text("utf-8")
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", text)
    assert "&lt;b&gt;math" in text
    assert "<b>math" not in text
    assert "<script" not in text
    heat = [_cells(table) for table in re.findall(r'<div class="scroll heat"><table>(.*?)</table>', text, re.DOTALL)]
    assert len(heat) == 7
    cosine, overlap, moved = heat[:3]
    assert cosine[0] == overlap[0] == ["", "&lt;b&gt;math", "code"]
    assert [row[0] for row in cosine[1:]] == ["&lt;b&gt;math", "code"]
    assert [row[i + 1] for i, row in enumerate(cosine[1:])] == ["1.00", "1.00"]
    assert [row[0] for row in moved[1:]] == ["0", "1", "norm"]
    assert all(1 < float(value) < 4 for row in moved[1:] for value in row[1:])
    assert "tau is the task vector of an expert" in text
    assert heat[3][0] == ["", "norm", "q"]
    assert [row[2] == "" for row in heat[3][1:]] == [False, False, True]
    assert heat[-1][0] == ["", "q"]  # a norm has no spectrum
    assert [row[0] for row in heat[-1][1:]] == ["0", "1"]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert any(title.startswith("Singular task interference") for title in titles)


def _cells(table: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spectra", "-1"], r"--spectra -1 is outside \[0, inf\)"),
        (["--html", "no/where.html"], "not a file in an existing folder; make the folder no"),
        (["--html", "."], "not a file in an existing folder"),
        (["--set", "base=nowhere"], "base: "),
        (["--set", "base=null"], "need a base model"),
        (["--threads", "0"], "--threads 0 is outside"),
    ],
)
def test_mistakes_cost_one_line(recipe: Path, words: list[str], message: str, capsys: Captured) -> None:
    assert main(["inspect", str(recipe), *words]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


def test_what_is_printed_as_json_is_the_whole_inspection(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(recipe), "--json", "--html", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert html_page(from_plain(told), "Task vectors of <b>math, code") == page.read_text()
    for broken in ({}, {**told, "layers": 3}, {**told, "model": {}}, {**told, "cells": {"0": []}}, []):
        with pytest.raises(SourceError, match=r"not what .* prints"):
            from_plain(broken)
