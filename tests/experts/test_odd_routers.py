"""Routers with another name in files than in memory, or a bias elsewhere: observed, shrunk, fitted, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experts.mixture_models import EXPERTS, IDS, logits, mixture_saved
from weightsmith.core.errors import PlanError
from weightsmith.experts import mapped
from weightsmith.experts.calibrate import Fit, calibrate
from weightsmith.experts.maps import read_map
from weightsmith.experts.shrink import shrink
from weightsmith.experts.smaller import Shrinking
from weightsmith.observe.collect import observe

ROWS = [torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(10)]


def observed(family: str, root: Path) -> Path:
    folder = mixture_saved(root / "m", family)
    observe(folder, ROWS, ["routing"], root / "stats", device="cpu")
    return folder


@pytest.mark.parametrize("family", ["phimoe", "minimax_m2"])
def test_observed_shrunk_and_fitted(family: str, tmp_path: Path) -> None:
    model = observed(family, tmp_path)
    names = {name.rpartition(".")[0] for name in load_file(tmp_path / "stats" / "routing.safetensors")}
    assert names == {f"model.layers.{layer}.block_sparse_moe.experts" for layer in (0, 1)}
    shrink(Shrinking(str(model), (str(tmp_path / "stats"),), "hc_smoe", experts=6), tmp_path / "out")
    assert torch.isfinite(logits(tmp_path / "out", IDS)).all()
    assert torch.isfinite(mapped.load(tmp_path / "out")(IDS).logits).all()
    made = calibrate(tmp_path / "out", ROWS, tmp_path / "fitted", Fit(steps=8), device="cpu")
    assert all(after <= before for before, after in made.errors.values())


def test_a_bias_beside_the_router_is_cut_with_it(tmp_path: Path) -> None:
    model, file = observed("minimax_m2", tmp_path), tmp_path / "stats" / "routing.safetensors"
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    seen = load_file(file)
    seen["model.layers.0.block_sparse_moe.experts.saliency"][1:5] = 0.0  # layers keep unlike numbers
    save_file(seen, file, notes)
    asked = Shrinking(str(model), (str(tmp_path / "stats"),), "reap", experts=5, budget="global")
    shrink(asked, tmp_path / "out")
    loaded = mapped.load(tmp_path / "out")
    assert len(set(read_map(tmp_path / "out").counts.values())) == 2
    before = load_file(model / "model.safetensors")
    for number, (name, labels) in enumerate(sorted(read_map(tmp_path / "out").labels.items())):
        stored = before[f"{name.removesuffix('.experts')}.e_score_correction_bias"]
        kept = loaded.model.layers[number].mlp.e_score_correction_bias
        torch.testing.assert_close(kept, stored[labels >= 0], rtol=0, atol=0)


def test_a_bias_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    model = observed("ernie4_5_moe", tmp_path)
    with pytest.raises(PlanError, match=rf"moe_statics\.e_score_correction_bias has \[1, {EXPERTS}\]"):
        shrink(Shrinking(str(model), (str(tmp_path / "stats"),), "reap", experts=6), tmp_path / "out")
    assert not (tmp_path / "out").exists()
