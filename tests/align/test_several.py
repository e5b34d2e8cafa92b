"""Several models onto one: MergeMany on whole models, through the verb and the folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import saved
from safetensors.torch import load_file, save_file

from weightsmith.align.chosen import NOTHING
from weightsmith.align.run import Aligned, Settings, matched, symmetries
from weightsmith.align.several import matched_all
from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError
from weightsmith.core.symmetry import identity, permute
from weightsmith.io.read.open import open_source

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two of its copies in other orders, and three strangers."""
    home = tmp_path_factory.mktemp("several")
    for seed, name in enumerate(("base", "x", "y", "z")):
        saved("llama", home / name, seed)
    groups = symmetries(home / "base").groups
    for seed, name in enumerate(("first", "second")):
        shutil.copytree(home / "base", home / name)
        state, draw = load_file(home / "base" / WEIGHTS), np.random.default_rng(seed)
        for group in groups:
            state |= permute(state, group, {n: draw.permuted(o, axis=-1) for n, o in identity(group).items()})
        save_file({n: t.contiguous() for n, t in state.items()}, home / name / WEIGHTS, {"format": "pt"})
    return home


def test_copies_in_other_orders_are_the_model_again(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moving = [str(models / "first"), str(models / "second")]
    assert main(["align", *moving, "--to", str(models / "base"), "-o", str(out), "--freeze", NOTHING, "--quiet"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["first", "second"]
    recipe = tmp_path / "recipe.yaml"
    views = "".join(f"  {n}: {{model: {models / n}, align: {out / n}}}\n" for n in ("first", "second"))
    recipe.write_text(f"models:\n  still: {models / 'base'}\n{views}method: linear\n")
    assert main(["merge", str(recipe), str(tmp_path / "merged"), "--quiet"]) == 0
    wanted, found = (load_file(folder / WEIGHTS) for folder in (models / "base", tmp_path / "merged"))
    assert all(torch.allclose(found[name], tensor, atol=1e-7) for name, tensor in wanted.items())


def test_strangers_lie_nearer_to_each_other_than_each_aligned_to_the_first(models: Path) -> None:
    x, y, z = (open_source(models / name) for name in ("x", "y", "z"))
    settings = Settings(restarts=3)
    together = matched_all({"y": y, "z": z}, x, settings)
    alone = {"y": matched(y, x, settings), "z": matched(z, x, settings)}

    def apart(found: dict[str, Aligned]) -> float:
        states = [{n: source.read(n).double() for n in source.keys} for source in (x, y, z)]
        for state, one in zip(states[1:], found.values(), strict=True):
            for group in one.layout.groups:
                state |= permute(state, group, one.orders)
        return sum(float(torch.stack([s[n] for s in states]).var(0).sum()) for n in x.keys)

    assert apart(together) < apart(alone)
    assert all(one.distance[1] < one.distance[0] for one in together.values())


def test_one_model_of_several_decides_what_stays(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "tuned")
    found = matched_all(
        {"tuned": open_source(tmp_path / "tuned"), "x": open_source(models / "x")},
        open_source(models / "base"),
        Settings(),
    )
    assert found["tuned"].aligned
    assert not found["x"].aligned
    assert all("residual" in one.layout.frozen for one in found.values())


def test_what_several_models_cannot_have(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y, z = (str(models / name) for name in "xyz")
    with pytest.raises(RecipeError, match="several models are matched by weights, without data, widths or spectra"):
        matched_all({"y": open_source(y), "z": open_source(z)}, open_source(x), Settings(keep=0.5))
    out = ["--to", x, "-o", str(tmp_path / "out")]
    assert main(["align", y, str(models / ".." / models.name / "y"), *out]) == 2
    assert "two of the models have one name" in capsys.readouterr().err
    assert main(["align", y, z, *out, "--bases"]) == 2
    assert "leave out all models but one" in capsys.readouterr().err
    assert main(["align", y, z, "--show"]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["align", y, z, *out, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"y", "z"}
