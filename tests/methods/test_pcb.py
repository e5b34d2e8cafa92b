"""PCB: closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from driver import every, merge

VARIANTS = ("release", "es", "vision", "paper")
SHAPES = {"a.weight": (7, 9), "b.bias": (11,), "c.weight": (4, 3, 2)}


def states(count: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return {
        f"e{i}": {n: 0.05 * torch.randn(s, generator=made) for n, s in SHAPES.items()} for i in range(count)
    }  # fmt: skip


ZERO = {n: torch.zeros(s) for n, s in SHAPES.items()}


def flat(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([t.double().numpy().ravel() for t in state.values()])


def pcb(experts, **parameters) -> np.ndarray:
    return flat(merge(experts, "pcb", base=ZERO, cut=every(3), **parameters))


def by_hand(deltas: np.ndarray, variant: str, ratio: float, clip: float) -> np.ndarray:
    """The formulae of the docstring, one line each: [n, d] -> [d]."""
    n, d = deltas.shape

    def clamped(x: np.ndarray, low: float, high: float) -> np.ndarray:
        rising = np.sort(x)
        return np.clip(x, rising[int(d * low)], rising[int(d * (1 - high) - 1)])

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    sizes = [clamped(np.abs(x), clip, clip) for x in deltas]
    signed = [np.sign(x) * norm(a) for x, a in zip(deltas, sizes, strict=True)]
    merged, total = np.zeros(d), np.zeros(d)
    for i in range(n):
        inter = {
            "release": lambda i=i: np.tanh(deltas[i] * deltas.sum(0)),
            "vision": lambda i=i: np.tanh(deltas[i] * sum(signed)),
            "es": lambda i=i: sum(np.tanh(signed[i] * s) for s in signed),
            "paper": lambda i=i: sum(softmax(norm(deltas[i] * other)) for other in deltas),
        }[variant]()
        scale = norm(clamped(np.exp(n * norm(sizes[i]) ** 2) * inter, 1 - ratio, 0))
        merged += np.sign(deltas[i]) * sizes[i] * scale
        total += scale
    return merged / np.maximum(total, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 1e-4), (0.3, 0.05), (1.0, 0.0)])
def test_the_formulae_over_the_whole_model(variant, ratio, clip):
    experts = states(3)
    got = pcb(experts, variant=variant, ratio=ratio, clip=clip)
    want = by_hand(np.stack([flat(e) for e in experts.values()]), variant, ratio, clip)
    assert np.abs(got - want).max() < 1e-6
    assert (want != 0).any()


def without_changes(experts: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Three of four entries as in the base, like rows of an embedding that training did not touch."""
    return {e: {n: t * (torch.arange(t.numel()) % 4 == 0).reshape(t.shape) for n, t in s.items()}
            for e, s in experts.items()}  # fmt: skip


def against(experts: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """The second outweighs the first everywhere, so that all scores of the first are negative."""
    first = experts["e0"]
    return {"e0": first, "e1": {n: -3 * t for n, t in first.items()}}


@pytest.mark.parametrize("variant", ["release", "es", "vision"])
@pytest.mark.parametrize(
    "experts",
    [states(1), without_changes(states(3)), against(states(1))],
    ids=["one expert", "mostly zeros", "negative scores"],
)
def test_the_formulae_where_scores_are_of_an_unusual_kind(experts, variant):
    got = pcb(experts, variant=variant, ratio=0.2, clip=0.01)
    want = by_hand(np.stack([flat(e) for e in experts.values()]), variant, 0.2, 0.01)
    assert np.abs(got - want).max() < 1e-6
    assert (want != 0).any()


def test_sizes_that_all_fall_on_one_quantile_have_no_weight():
    """All but a few entries have one size, and the clamp takes those few: 0 / 0 in the authors' code."""
    flat_one = {n: torch.full(s, 0.1) for n, s in SHAPES.items()}
    flat_one["b.bias"][0] = 5.0
    assert not pcb({"a": flat_one}, clip=0.05).any()
    (one,) = states(1).values()
    assert np.isfinite(pcb({"a": flat_one, "b": one}, clip=0.05)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_scope_tensor_is_each_tensor_by_itself(variant):
    experts = states(3)
    whole = merge(experts, "pcb", base=ZERO, variant=variant, scope="tensor", ratio=0.4)
    for name, shape in SHAPES.items():
        alone = {e: {name: s[name]} for e, s in experts.items()}
        got = merge(alone, "pcb", base={name: torch.zeros(shape)}, variant=variant, ratio=0.4)
        assert torch.allclose(got[name], whole[name], atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_experts_give_the_clamped_change_where_it_is_kept(variant):
    (one,) = states(1).values()
    got, change = pcb({"a": one, "b": one, "c": one}, variant=variant, clip=0.1, ratio=0.3), flat(one)
    rising = np.sort(np.abs(change))
    clamped = np.sign(change) * np.clip(np.abs(change), rising[int(98 * 0.1)], rising[int(98 * 0.9 - 1)])
    kept = got != 0
    assert np.allclose(got[kept], clamped[kept], atol=1e-7)
    # Equal scores: the clamped largest entries tie at the top.
    assert 0.25 <= kept.mean() <= 0.35


def test_ratio_counts_the_entries_with_a_score():
    (one,) = states(1, seed=4).values()
    for ratio in (0.05, 0.1, 0.37, 1.0):
        kept = (pcb({"a": one}, ratio=ratio, clip=0.0) != 0).sum()
        assert kept == 98 - int(98 * (1 - ratio)) - 1  # the entry at the quantile itself has score 0


def test_lambda_scales_the_change_and_differs_between_experts():
    experts = states(2)
    once = pcb(experts)
    assert np.allclose(pcb(experts, **{"lambda": 2.5}), 2.5 * once, atol=1e-7)
    only = pcb(experts, **{"lambda": (1.0, 0.0)}) + pcb(experts, **{"lambda": (0.0, 1.0)})
    assert np.allclose(only, once, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_expert_equal_to_the_base_has_no_weight(variant):
    (one,) = states(1).values()
    got = pcb({"a": one, "b": ZERO}, variant=variant, clip=0.0, ratio=0.3)
    kept = got != 0
    assert kept.any()
    assert np.allclose(got[kept], flat(one)[kept], atol=1e-7)


def test_a_hundred_experts_do_not_overflow():
    assert np.isfinite(pcb(states(100), ratio=0.5)).all()
