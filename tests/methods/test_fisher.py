"""Fisher-weighted averaging: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge

from kit import noise, refusal
from weightsmith.core.errors import NumericError
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.merge import run
from weightsmith.methods.fisher import Fisher
from weightsmith.recipe.load import loads

SHAPES = {"w": (5, 4), "b": (5,)}
MODELS = {f"e{j}": {n: noise(*s, seed=10 * j + i) for i, (n, s) in enumerate(SHAPES.items())} for j in range(3)}
FISHERS = {
    f"e{j}": {n: noise(*s, seed=70 + 10 * j + i).square() for i, (n, s) in enumerate(SHAPES.items())} for j in range(3)
}


def merged(fishers=FISHERS, models=MODELS, **parameters):
    return merge(models, "fisher", stats={m: {"fisher": f} for m, f in fishers.items()}, cut=every(2), **parameters)


def scaled(model: str, factor: float):
    return {m: {n: t * factor if m == model else t for n, t in f.items()} for m, f in FISHERS.items()}


def test_equal_fishers_give_the_weighted_mean_and_one_model_itself():
    same = dict.fromkeys(MODELS, FISHERS["e0"])
    got = merged(same, weight=(1.0, 2.0, 1.0))["w"]
    assert torch.allclose(got, (MODELS["e0"]["w"] + 2 * MODELS["e1"]["w"] + MODELS["e2"]["w"]) / 4, atol=1e-6)
    assert torch.equal(merged(models={"e0": MODELS["e0"]}, fishers={"e0": FISHERS["e0"]})["w"], MODELS["e0"]["w"])


def test_it_minimises_the_sum_of_quadratic_losses():
    got = merged(normalize=False, floor=0.0)
    for n in SHAPES:
        gradient = sum(FISHERS[m][n] * (got[n] - MODELS[m][n]) for m in MODELS)
        assert gradient.abs().max() < 1e-5


def test_normalising_makes_the_scale_of_a_fisher_irrelevant():
    for n in SHAPES:
        a, b = merged(floor=0.0)[n], merged(scaled("e1", 1000.0), floor=0.0)[n]
        assert torch.allclose(a, b, atol=1e-6)
        assert not torch.allclose(a, merged(scaled("e1", 1000.0), floor=0.0, normalize=False)[n], atol=1e-2)


def test_the_norm_is_over_the_whole_model_and_the_floor_is_added_after_it():
    norms = [sum(float(t.double().square().sum()) for t in f.values()) ** 0.5 for f in FISHERS.values()]
    shares = [(FISHERS[m]["w"] + 0.1) / (norm + 0.1) for m, norm in zip(MODELS, norms, strict=True)]
    wanted = sum(s * m["w"] for s, m in zip(shares, MODELS.values(), strict=True)) / sum(shares)
    assert torch.allclose(merged(floor=0.1)["w"], wanted, atol=1e-6)


def test_floors_where_all_fishers_vanish():
    nothing = {m: {n: torch.zeros_like(t) for n, t in f.items()} for m, f in FISHERS.items()}
    mean = sum(m["w"] for m in MODELS.values()) / 3
    for mode in ("add", "max"):
        assert torch.allclose(merged(nothing, floor_mode=mode)["w"], mean, atol=1e-6)
    assert torch.equal(merged(nothing, floor_mode="max_target")["w"], MODELS["e0"]["w"])
    with pytest.raises(NumericError, match=r"w: .* all models is 0 somewhere.*set floor above 0"):
        merged(nothing, floor=0.0)
    tiny = {m: {n: t * 1e-30 for n, t in f.items()} for m, f in FISHERS.items()}
    assert torch.allclose(merged(tiny, floor=0.0)["w"], merged(floor=0.0)["w"], atol=1e-5)


def test_bad_fishers_are_named():
    for bad in (-1.0, float("nan"), float("inf")):
        broken = {m: {n: t.clone() for n, t in f.items()} for m, f in FISHERS.items()}
        broken["e1"]["b"][3] = bad
        with pytest.raises(NumericError, match="b: the Fisher information of e1 is negative, infinite or not a number"):
            merged(broken, normalize=False)
    short = {m: {n: t[:3] for n, t in f.items()} for m, f in FISHERS.items()}
    with pytest.raises(NumericError, match=r"w: the Fisher information of e0 has shape \[3, 4\]"):
        merged(short)
    assert refusal(Fisher(weight=0.0), 2, has_base=False) == "all weights are 0; give one model a positive weight"


def test_what_is_excluded_has_no_part_in_the_norm(tmp_path):
    """A huge Fisher information of an excluded tensor would change every weight of the others."""
    models = {m: MemorySource(t, m) for m, t in MODELS.items()}
    fishers = {m: {**f, "b": f["b"] * (1e6 if m == "e1" else 1)} for m, f in FISHERS.items()}
    stats = {"fisher": {m: MemorySource(f, m) for m, f in fishers.items()}}
    recipe = loads("models: {e0: m/a, e1: m/b, e2: m/c}\nmethod: {fisher: {floor: 0.0}}\nexclude: [b]")
    run(recipe, tmp_path / "out", sources=Inputs(None, models, stats))
    got = open_source(tmp_path / "out")
    norms = [float(f["w"].double().norm()) for f in FISHERS.values()]
    shares = [f["w"] / norm for f, norm in zip(FISHERS.values(), norms, strict=True)]
    wanted = sum(s * m["w"] for s, m in zip(shares, MODELS.values(), strict=True)) / sum(shares)
    assert torch.allclose(got.read("w"), wanted, atol=1e-6)
    assert torch.equal(got.read("b"), MODELS["e0"]["b"])
