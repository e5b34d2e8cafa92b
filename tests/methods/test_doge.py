"""DOGE: closed forms, the loop it stands for, and the masks over the whole model."""

from __future__ import annotations

import pytest
import torch
from driver import merge
from loops import adam, gradient

from kit import noise
from weightsmith.methods import doge


def deltas(*changes: dict[str, torch.Tensor], **parameters) -> dict[str, torch.Tensor]:
    base = {n: torch.zeros_like(t) for n, t in changes[0].items()}
    return merge({f"e{i}": c for i, c in enumerate(changes)}, "doge", base=base, **parameters)


def delta(*changes: torch.Tensor, **parameters) -> torch.Tensor:
    return deltas(*({"w": c} for c in changes), **({"density": 1.0} | parameters))["w"]


def shared_space(taus: torch.Tensor, subspace: int) -> torch.Tensor:
    smaller = min(taus.shape[1:])
    leading = [torch.linalg.svd(t, full_matrices=False).U[:, : smaller // len(taus)] for t in taus]
    return torch.linalg.svd(torch.cat(leading, 1), full_matrices=False).U[:, : smaller // subspace]


def loss(correction: torch.Tensor, taus: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    merged = sum(f * (t + correction) for f, t in zip(factors, taus, strict=True))
    return sum((t * (t - merged)).sum(1).square().sum() for t in taus)


def test_without_steps_every_task_gets_the_same_norm():
    taus = torch.stack([noise(6, 9, seed=i) * 3**i for i in range(3)])
    expected = sum(0.2 * t / t.norm() for t in taus)
    assert torch.allclose(delta(*taus, iters=0, **{"lambda": 0.2}), expected, atol=1e-6)


def test_one_expert_at_its_own_norm_comes_back():
    change = noise(6, 9)
    assert torch.allclose(delta(change, iters=0, **{"lambda": float(change.norm())}), change, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 11), (11, 8)], ids=["wide", "tall"])
def test_the_published_loop(shape):
    taus = torch.stack([0.3 * noise(*shape, seed=i) for i in range(3)])
    wide = taus.double()
    factors, space = 0.5 / wide.flatten(1).norm(dim=1), shared_space(wide, 4)
    correction = adam(
        lambda d: loss(d, wide, factors), torch.zeros_like(wide[0]), 50, 1e-3, lambda g: g - space @ (space.T @ g)
    )
    assert correction.abs().max() > 0.02
    expected = sum(f * (t + correction) for f, t in zip(factors, wide, strict=True))
    got = delta(*taus, subspace=4, iters=50, lr=1e-3, **{"lambda": 0.5})
    assert torch.allclose(got, expected.float(), atol=1e-6)


def test_the_loss_falls():
    taus = torch.stack([0.3 * noise(8, 11, seed=i) for i in range(3)]).double()
    factors = [0.5 / float(t.norm()) for t in taus]
    start, end = (
        loss(doge.Doge(lambda_=0.5, iters=n, lr=1e-3)._correction(taus, factors), taus, torch.tensor(factors))
        for n in (0, 200)
    )
    assert end < 0.9 * start


def test_the_whole_space_protected_leaves_no_correction():
    for count in (3, 4):  # 4 tasks bring 1 direction each; the projector is the identity all the same
        taus = torch.stack([noise(6, 9, seed=i) for i in range(count)])
        assert torch.equal(delta(*taus, subspace=1), delta(*taus, iters=0))
    assert not torch.equal(delta(*taus, subspace=2), delta(*taus, iters=0))


def test_gradients_lose_their_part_in_the_shared_space(monkeypatch):
    taus = torch.stack([noise(8, 11, seed=i) for i in range(2)]).double()
    factors = [0.1, 0.2]
    monkeypatch.setattr(doge, "adam", lambda gradient, start, steps, lr: start - gradient(start))
    full = gradient(lambda d: loss(d, taus, torch.tensor(factors)), torch.zeros_like(taus[0]))
    assert torch.allclose(doge.Doge(subspace=100)._correction(taus, factors), -full)  # 8 // 100: nothing is protected
    space = shared_space(taus, 3)
    step = doge.Doge(subspace=3)._correction(taus, factors)
    assert (space.T @ step).abs().max() < 1e-12 * full.abs().max()
    assert torch.allclose(step, space @ (space.T @ full) - full)


def test_masks_are_decided_over_the_whole_model():
    small, large = {"a": noise(6, 9), "b": noise(5, 8, seed=1)}, {"a": noise(6, 9, seed=2), "b": noise(5, 8, seed=3)}
    small["b"] = small["b"] * 100  # of the first expert, tensor b holds all large entries
    for share in (0.1, 0.3, 1 / 3):
        kept = [sum(int((t != 0).sum()) for t in deltas(e, iters=0, density=share).values()) for e in (small, large)]
        assert kept == [int(94 * share) + 1] * 2
    found = deltas(small, iters=0, density=0.3)
    assert not found["a"].any()
    entries = small["b"].abs().flatten().sort(descending=True).values
    assert torch.equal(found["b"] != 0, small["b"].abs() >= entries[int(94 * 0.3)])


def test_equals_at_the_threshold_are_all_kept():
    change = torch.tensor([[1.0, 2.0, 2.0], [2.0, 3.0, 0.5]])
    assert torch.equal(delta(change, iters=0, density=0.2) != 0, change >= 2)


def test_the_mask_takes_the_correction_too():
    taus = [0.3 * noise(8, 11, seed=i) for i in range(3)]
    found = deltas(*({"w": t} for t in taus), density=0.2, subspace=100, **{"lambda": 0.5})["w"]
    kept = torch.stack([t.abs() >= t.abs().flatten().sort(descending=True).values[int(88 * 0.2)] for t in taus])
    assert torch.equal(found != 0, kept.any(0))


def test_a_task_of_zeros_has_no_say():
    a, b, zero = noise(9, 9), noise(9, 9, seed=1), torch.zeros(9, 9)
    free = {"subspace": 100, "lr": 1e-3}  # a third task leaves fewer directions per task to protect
    assert torch.allclose(delta(a, zero, b, **free), delta(a, b, **free), atol=1e-7)
    assert torch.isfinite(delta(a, zero, b)).all()
    assert torch.equal(delta(zero, zero), zero)


def test_other_tensors_stay_the_bases():
    base = {"w": noise(4, 4), "norm": noise(4, seed=1), "conv": noise(3, 2, 2, seed=2)}
    experts = {f"e{i}": {n: t + noise(*t.shape, seed=i + 5) for n, t in base.items()} for i in range(2)}
    merged = merge(experts, "doge", base=base)
    assert [n for n in base if not torch.equal(merged[n], base[n])] == ["w"]
