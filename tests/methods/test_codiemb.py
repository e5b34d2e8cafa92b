"""Delta-guided fusion: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge

from kit import noise

SHAPES = {"w": (6, 4), "b": (5,)}
BASE = {n: noise(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
DELTAS = {f"e{j}": {n: (j + 1) * noise(*s, seed=10 * j + i) for i, (n, s) in enumerate(SHAPES.items())}
          for j in range(3)}  # fmt: skip
MODELS = {m: {n: BASE[n] + d[n] for n in SHAPES} for m, d in DELTAS.items()}


def merged(models=MODELS, **parameters):
    return merge(models, "codiemb", base=BASE, cut=every(2), **parameters)


@pytest.mark.parametrize(("score", "size"), [
    ("l1_mean", lambda d: d.abs().mean()), ("l2", lambda d: d.norm()), ("sq", lambda d: d.square().sum())
])  # fmt: skip
def test_weights_are_the_shares_of_the_deviations(score, size):
    for power in (1.0, 2.5):
        found = merged(score=score, power=power)
        for n in SHAPES:
            sizes = [float(size(d[n].double())) ** power for d in DELTAS.values()]
            wanted = BASE[n] + sum(s / sum(sizes) * d[n] for s, d in zip(sizes, DELTAS.values(), strict=True))
            assert torch.allclose(found[n], wanted, atol=1e-5)


def test_entries_have_shares_of_their_own():
    found = merged(scope="element")
    for n in SHAPES:
        stack = torch.stack([d[n] for d in DELTAS.values()])
        wanted = BASE[n] + (stack.abs() * stack).sum(0) / stack.abs().sum(0)
        assert torch.allclose(found[n], wanted, atol=1e-5)


def test_equal_models_and_equal_deviations():
    same = dict.fromkeys("abc", MODELS["e1"])
    assert torch.allclose(merged(same)["w"], MODELS["e1"]["w"], atol=1e-6)
    mirrored = {"a": {n: BASE[n] + d for n, d in DELTAS["e0"].items()},
                "b": {n: BASE[n] - d for n, d in DELTAS["e0"].items()}}  # fmt: skip
    assert torch.allclose(merged(mirrored)["w"], BASE["w"], atol=1e-6)


@pytest.mark.parametrize("scope", ["tensor", "element"])
def test_a_checkpoint_that_did_not_move_has_no_weight(scope):
    found = merged({"moved": MODELS["e0"], "still": BASE}, scope=scope)
    assert torch.allclose(found["w"], MODELS["e0"]["w"], atol=1e-6)
    assert torch.equal(merged({"a": BASE, "b": BASE}, scope=scope)["w"], BASE["w"])


def test_a_longer_run_does_not_lead_everywhere():
    long = {"a": {n: BASE[n] + d for n, d in DELTAS["e0"].items()},
            "b": {n: BASE[n] + 100 * d for n, d in DELTAS["e0"].items()}}  # fmt: skip
    for n in SHAPES:
        assert torch.allclose(merged(long, normalize="model")[n], BASE[n] + 50.5 * DELTAS["e0"][n], atol=1e-3)
        assert not torch.allclose(merged(long)[n], BASE[n] + 50.5 * DELTAS["e0"][n], atol=1.0)
