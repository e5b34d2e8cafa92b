"""Soups of checkpoints: closed forms of `soup` and `mwa`."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge
from torch import Tensor

from kit import refusal
from weightsmith.core.method import registry
from weightsmith.methods.mwa import Mwa
from weightsmith.methods.soup import Soup

MODELS = {f"e{i}": {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(i))} for i in range(4)}
TENSORS = [m["w"] for m in MODELS.values()]


def run(method: str, count: int = 4, **parameters) -> Tensor:
    return merge(dict(list(MODELS.items())[:count]), method, cut=every(3), **parameters)["w"]


def test_the_uniform_soup_is_linear():
    assert torch.equal(run("soup"), run("linear"))
    assert registry("uniform_soup") is registry("linear")


def test_the_best_few():
    score = (0.2, 0.9, 0.5, 0.9)
    assert torch.equal(run("soup", score=score, size=1), TENSORS[1])  # equals in order
    assert torch.allclose(run("soup", score=score, size=2), (TENSORS[1] + TENSORS[3]) / 2)
    assert torch.allclose(run("soup", score=score, size=3), (TENSORS[1] + TENSORS[2] + TENSORS[3]) / 3)
    assert torch.equal(run("soup", score=score, size=4), run("linear"))


def test_soups_that_cannot_be_chosen():
    assert refusal(Soup(size=5), 4, has_base=False) == "size = 5 is more than the 4 models"
    assert "needs a score" in str(refusal(Soup(size=2), 4, has_base=False))
    assert refusal(Soup(size=2, score=(0.1, 0.2, 0.3, 0.4)), 4, has_base=False) is None


@pytest.mark.parametrize(
    ("value", "parameters", "shares"),
    [
        ((1.0, 2.0), {}, (2 / 3, 1 / 3)),
        ((5.0,), {}, (1.0,)),
        ((100.0, 300.0), {"metric": "steps", "penalty": 2.0}, (0.1, 0.9)),
        ((0.5, 0.25), {"metric": "score"}, (2 / 3, 1 / 3)),
        ((3.0, 1.0, 2.0), {"rule": "rank"}, (1 / 6, 3 / 6, 2 / 6)),
        ((3.0, 1.0, 2.0), {"rule": "rank", "metric": "score"}, (3 / 6, 1 / 6, 2 / 6)),
        ((1.0, 2.0, 2.0), {"rule": "rank"}, (3 / 6, 1.5 / 6, 1.5 / 6)),
        ((-1.0, 1.0), {"rule": "softmax"}, (0.7310586, 0.2689414)),
        ((-1.0, 1.0), {"rule": "softmax", "metric": "score"}, (0.2689414, 0.7310586)),
        ((2.0, 2.0), {"rule": "softmax", "penalty": 5.0}, (0.5, 0.5)),
    ],
)
def test_weights(value, parameters, shares):
    spec = Mwa(value=value, **parameters).fused(len(value))
    assert [w / spec.divisor for w in spec.weights] == pytest.approx(shares, abs=1e-7)
    want = sum(t * s for t, s in zip(TENSORS, shares, strict=False))
    assert torch.allclose(run("mwa", len(value), value=value, **parameters), want, atol=1e-6)


@pytest.mark.parametrize("rule", ["power", "softmax", "rank"])
@pytest.mark.parametrize("metric", ["loss", "steps", "score"])
def test_no_penalty_is_the_mean_and_a_large_one_the_best(rule, metric):
    value = (3.0, 1.5, 2.5, 4.0)
    assert torch.equal(run("mwa", value=value, rule=rule, metric=metric, penalty=0.0), run("linear"))
    best = TENSORS[1] if metric == "loss" else TENSORS[3]
    assert torch.allclose(run("mwa", value=value, rule=rule, metric=metric, penalty=1e6), best)
    more = tuple(7 * v for v in value)
    own, other = (Mwa(value=v, rule=rule, metric=metric).fused(4).weights for v in (value, more))
    assert own == pytest.approx(other)


def test_values_that_the_power_rule_cannot_take():
    assert "values above 0, not 0" in str(refusal(Mwa(value=(0.0, 1.0)), 2, has_base=False))
    assert "use rule softmax or rank" in str(refusal(Mwa(value=(-1.0, 1.0), metric="score"), 2, has_base=False))
    assert refusal(Mwa(value=(0.0, 1.0), metric="score"), 2, has_base=False) is None
    assert torch.equal(run("mwa", 2, value=(0.0, 1.0), metric="score"), TENSORS[1])
    assert refusal(Mwa(value=(-1.0, 1.0), rule="softmax"), 2, has_base=False) is None
