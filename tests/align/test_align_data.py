"""Orders of whole transformers from what the models do on data: activations, and straight-through gradients."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import saved
from safetensors.torch import save_file

from weightsmith.align.data import Pair, by_activations, learned
from weightsmith.align.layout import layout
from weightsmith.align.match import objective
from weightsmith.align.proof import drawn
from weightsmith.align.run import Settings, matched
from weightsmith.cli.main import main
from weightsmith.core.errors import NumericError, RecipeError, SourceError
from weightsmith.core.symmetry import permute
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.open import open_source
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model

FAMILIES = ("llama", "gpt2", "gpt_neox", "bert", "vit")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, and beside it the same with all units elsewhere."""
    home = tmp_path_factory.mktemp("data")
    for family in (*FAMILIES, "mixtral"):
        saved(family, home / family)
        source = open_source(home / family)
        tensors = {name: source.read(name) for name in source.keys}
        draw = np.random.default_rng(3)
        for group in layout(source).groups if family != "mixtral" else ():
            tensors |= permute(tensors, group, drawn(group, draw))
        shutil.copytree(home / family, home / f"{family}-moved")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, home / f"{family}-moved" / "model.safetensors", {"format": "pt"})
    return home


def pair(models: Path, family: str, count: int = 12) -> Pair:
    first, second = (load_model(models / name, device="cpu") for name in (family, f"{family}-moved"))
    draw = torch.Generator().manual_seed(0)
    examples: list[Any] = [torch.randint(2, 50, (8 + i % 3,), generator=draw) for i in range(count)]
    if family == "vit":
        examples = [(torch.randn(3, 8, 8, generator=draw), i % 2) for i in range(count)]
    return Pair(first, second, read_examples(examples, first), batch=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_undo_permutations_of_everything(family: str, models: Path) -> None:
    """Residual stream, MLPs and heads with all that is inside them, of texts of unlike length and of images."""
    source, moved = (open_source(models / name) for name in (family, f"{family}-moved"))
    groups = layout(source).groups
    assert groups
    both = pair(models, family)
    orders = by_activations(moved, groups, both)
    tensors = {name: moved.read(name) for name in moved.keys}
    for group in groups:
        tensors |= permute(tensors, group, orders)
    assert all(torch.equal(tensors[name], source.read(name)) for name in source.keys)
    assert any(not torch.equal(moved.read(name), source.read(name)) for name in source.keys)


def test_products_come_in_passes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = layout(open_source(models / "llama")).groups
    whole = by_activations(open_source(models / "llama-moved"), groups, pair(models, "llama"))
    monkeypatch.setattr("weightsmith.align.data._HELD", 1)
    apart = by_activations(open_source(models / "llama-moved"), groups, pair(models, "llama"))
    assert whole.keys() == apart.keys()
    assert all((whole[name] == apart[name]).all() for name in whole)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_gradients_keep_a_copy_in_its_place(family: str, models: Path) -> None:
    source, moved = (open_source(models / name) for name in (family, f"{family}-moved"))
    both = pair(models, family, 6)
    orders = learned(layout(source).groups, both, epochs=1, lr=1e-3)
    tensors = {name: moved.read(name) for name in moved.keys}
    for group in layout(source).groups:
        tensors |= permute(tensors, group, orders)
    first = {name: source.read(name) for name in source.keys}
    assert objective(first, tensors) == pytest.approx(objective(first, first))


def test_what_data_cannot_match(models: Path) -> None:
    source = open_source(models / "mixtral")
    with pytest.raises(SourceError, match=r"no layer shows the units of .*experts by itself; match it by weights"):
        by_activations(source, layout(source).groups, pair(models, "mixtral"))
    with pytest.raises(SourceError, match=r"is stored in another form than it runs in; match by weights"):
        learned(layout(source).groups, pair(models, "mixtral"), epochs=1, lr=1e-2)
    broken = pair(models, "llama")
    with torch.no_grad():
        next(p for n, p in broken.moving.module.named_parameters() if "norm" in n).fill_(torch.nan)
    groups = layout(open_source(models / "llama")).groups
    with pytest.raises(NumericError, match=r"(inputs|outputs) of .* hold NaN or Inf"):
        by_activations(open_source(models / "llama"), groups, broken)
    for given, said in (
        ({"by": "weights", "data": "x"}, "data are for --by activations, --by ste and partial merges; leave them out"),
        ({"by": "ste"}, "--by ste needs data; give --data"),
        ({"by": "gradients", "data": "x"}, "by = 'gradients' is none of weights, activations, ste"),
        ({"by": "ste", "data": "x", "epochs": 0}, r"epochs = 0 is outside \[1, inf\)"),
        ({"by": "ste", "data": "x", "lr": 0.0}, "lr = 0 is not above 0"),
    ):
        with pytest.raises(RecipeError, match=said):
            Settings(**given)
    vit = pair(models, "vit")
    unlabelled = Pair(vit.reference, vit.moving, read_examples([torch.zeros(3, 8, 8)] * 3, vit.reference))
    with pytest.raises(SourceError, match="examples without labels; a classifier's loss needs them"):
        learned(layout(open_source(models / "vit")).groups, unlabelled, epochs=1, lr=1e-2)


def test_the_verb_takes_data(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=draw.normal(size=(8, 3, 8, 8)).astype(np.float32), y=np.arange(8) % 2)
    words = ["align", str(models / "vit-moved"), "--to", str(models / "vit"), "-o", str(tmp_path / "out")]
    assert main([*words, "--by", "activations", "--data", str(tmp_path / "x.npz"), "--examples", "8"]) == 0
    assert "objective" in capsys.readouterr().out
    noted = read_manifest(tmp_path / "out")
    assert noted["recipe"]["by"] == "activations"
    assert list(noted["made_by"]) == ["found by matching activations"]
    assert main([*words, "--by", "ste", "--overwrite"]) == 2
    assert "--by ste needs data; give --data" in capsys.readouterr().err
    settings = Settings(by="ste", data=str(tmp_path / "x.npz"), examples=8, freeze=("nothing",))
    found = matched(open_source(models / "vit-moved"), open_source(models / "vit"), settings)
    assert found.after > found.before
