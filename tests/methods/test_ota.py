"""Averages by the curvature that Adam has seen, and the mask of its important changes: closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from driver import every, merge

from kit import noise
from weightsmith.core.checks import Case
from weightsmith.core.errors import NumericError
from weightsmith.methods.ffg import Ffg
from weightsmith.methods.ota import Ota
from weightsmith.ops.moments import low_rank, powered, product, rank_one

SHAPES = {"w": (6, 4), "b": (5,)}
BASE = {n: noise(*s, seed=90 + i) for i, (n, s) in enumerate(SHAPES.items())}
MODELS = {
    f"e{j}": {n: BASE[n] + 0.1 * noise(*s, seed=10 * j + i) for i, (n, s) in enumerate(SHAPES.items())}
    for j in range(3)
}
MOMENTS = {
    f"e{j}": {n: 1e-16 * noise(*s, seed=70 + 10 * j + i).square() for i, (n, s) in enumerate(SHAPES.items())}
    for j in range(3)
}


def merged(method="ota", moments=MOMENTS, models=MODELS, base=None, **parameters):
    stats = {m: {"second_moment": v} for m, v in moments.items()}
    return merge(models, method, base=base, stats=stats, cut=every(2), **parameters)


def test_equal_moments_give_the_mean_and_one_model_itself():
    same = dict.fromkeys(MODELS, MOMENTS["e0"])
    wanted = sum(m["w"] for m in MODELS.values()) / 3
    assert torch.allclose(merged(moments=same)["w"], wanted, atol=1e-6)
    assert torch.allclose(merged(moments=same, base=BASE)["w"], wanted, atol=1e-6)
    one = {"e0": MODELS["e0"]}
    assert torch.equal(merged(models=one, moments={"e0": MOMENTS["e0"]})["w"], MODELS["e0"]["w"])


@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_the_weights_are_powers_of_the_moments(normalize: str):
    got = merged(power=0.7, epsilon=0.0, normalize=normalize, weight=(1.0, 2.0, 0.5))
    for n in SHAPES:
        powers = [v[n].double() ** 0.7 for v in MOMENTS.values()]
        if normalize == "mean":
            powers = [p / p.mean() for p in powers]
        a = [p * s for p, s in zip(powers, (1.0, 2.0, 0.5), strict=True)]
        wanted = sum(x * m[n] for x, m in zip(a, MODELS.values(), strict=True)) / sum(a)
        assert torch.allclose(got[n].double(), wanted, atol=1e-6)


def test_roots_of_moments_are_rounded_as_everywhere():
    """`Tensor.sqrt` of float32 is not: the bytes of a merge would be the processor's."""
    moments = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(powered(moments, 0.5).numpy(), np.sqrt(moments.numpy()))


def test_a_common_factor_of_the_moments_changes_nothing():
    far = {m: {n: t * 1e-6 for n, t in v.items()} for m, v in MOMENTS.items()}
    for n in SHAPES:
        assert torch.allclose(merged()[n], merged(moments=far)[n], atol=1e-6)


def test_an_absolute_epsilon_above_the_moments_gives_the_mean():
    wanted = sum(m["w"] for m in MODELS.values()) / 3
    assert torch.allclose(merged(epsilon=1e-3, epsilon_mode="absolute")["w"], wanted, atol=1e-4)
    assert not torch.allclose(merged()["w"], wanted, atol=1e-2)


def test_a_model_without_curvature_has_no_influence():
    nothing = {**MOMENTS, "e1": {n: torch.zeros_like(t) for n, t in MOMENTS["e1"].items()}}
    two = {m: MODELS[m] for m in ("e0", "e2")}
    for n in SHAPES:
        alone = merged(models=two, moments={m: MOMENTS[m] for m in two}, epsilon=0.0)[n]
        assert torch.allclose(merged(moments=nothing, epsilon=0.0)[n], alone, atol=1e-6)


def test_without_any_curvature_the_mean_is_left():
    nothing = {m: {n: torch.zeros_like(t) for n, t in v.items()} for m, v in MOMENTS.items()}
    wanted = sum(m["w"] for m in MODELS.values()) / 3
    for base in (None, BASE):
        assert torch.allclose(merged(moments=nothing, base=base)["w"], wanted, atol=1e-6)


@pytest.mark.parametrize("fallback", ["base", "mean"])
def test_dropped_entries_have_no_weight(fallback: str):
    least = 1e-18
    got = merged([Ffg(threshold=least), Ota(epsilon=0.0, fallback=fallback)], base=BASE)
    for n in SHAPES:
        kept = [
            v[n] * (m[n] - BASE[n]).square() >= least for v, m in zip(MOMENTS.values(), MODELS.values(), strict=True)
        ]
        a = [v[n].double().sqrt() * k for v, k in zip(MOMENTS.values(), kept, strict=True)]
        total = sum(a)
        inside = sum(x * (m[n] - BASE[n]) for x, m in zip(a, MODELS.values(), strict=True)) / total
        outside = 0.0 if fallback == "base" else sum(m[n] - BASE[n] for m in MODELS.values()) / 3
        wanted = BASE[n] + torch.where(total > 0, inside, outside)
        assert 0 < int((total > 0).sum()) < total.numel() or n == "b"
        assert torch.allclose(got[n].double(), wanted, atol=1e-6)


def test_one_model_keeps_the_largest_scores_of_the_whole_model():
    scores = {n: MOMENTS["e0"][n] * (MODELS["e0"][n] - BASE[n]).square() for n in SHAPES}
    every_score = torch.cat([s.reshape(-1) for s in scores.values()]).sort(descending=True).values
    least = every_score[int(0.4 * len(every_score))]
    one = {"e0": MODELS["e0"]}
    got = merged([Ffg(density=0.4), "task_arithmetic"], {"e0": MOMENTS["e0"]}, one, BASE)
    for n in SHAPES:
        assert torch.allclose(got[n], torch.where(scores[n] >= least * (1 - 1e-5), MODELS["e0"][n], BASE[n]), atol=1e-6)


def test_thresholds_are_for_all_models_or_none():
    assert Ffg(threshold=(1e-9, 0.0)).refusal(Case(2)) == "some thresholds are 0; give every model one above 0, or none"
    nothing = merged([Ffg(threshold=1.0), "task_arithmetic"], base=BASE)
    assert all(torch.equal(nothing[n], BASE[n]) for n in SHAPES)


def test_the_size_of_the_change_does_without_curvature():
    got = merged([Ffg(threshold=0.1, metric="magnitude"), "task_arithmetic"], base=BASE)
    wanted = sum(torch.where(d.abs() >= 0.1, d, 0.0) for d in (m["w"] - BASE["w"] for m in MODELS.values()))
    assert torch.allclose(got["w"], BASE["w"] + wanted, atol=1e-6)


def test_negative_moments_are_an_error():
    wrong = {**MOMENTS, "e1": {n: -t for n, t in MOMENTS["e1"].items()}}
    with pytest.raises(NumericError, match="the second moment of e1 is negative, infinite or not a number"):
        merged(moments=wrong)


def test_one_outer_product_says_all_of_an_outer_product():
    v = torch.outer(noise(5, seed=1).square(), noise(4, seed=2).square()) * 1e-20
    assert torch.allclose(product(*rank_one(v)), v, rtol=1e-5, atol=0)
    assert torch.allclose(product(*low_rank(v, 1)), v, rtol=1e-4, atol=0)
    any_v = noise(5, 4, seed=3).square()
    assert torch.allclose(product(*low_rank(any_v, 4)), any_v, rtol=1e-5, atol=1e-6)
    for found in (rank_one(any_v), low_rank(any_v, 2)):
        assert (product(*found) >= 0).all()
    assert (torch.linalg.multi_dot(low_rank(any_v, 2)) < 0).any(), "else nothing was cut off"
    assert torch.equal(product(*rank_one(torch.zeros(3, 2))), torch.zeros(3, 2))
    assert torch.equal(product(*low_rank(torch.zeros(3, 2), 2)), torch.zeros(3, 2))
    assert torch.allclose(product(*rank_one(any_v)).sum(0), any_v.sum(0), rtol=1e-5)
