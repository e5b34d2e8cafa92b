"""SCE: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge
from torch import Tensor

from kit import noise


def sce(*deltas: Tensor, **parameters) -> Tensor:
    models = {f"e{i}": {"w": d} for i, d in enumerate(deltas)}
    return merge(models, "sce", base={"w": torch.zeros_like(deltas[0])}, cut=every(2), **parameters)["w"]


X = [noise(7, 5, seed=i) for i in range(5)]


def by_hand(deltas: Tensor, topk: float = 1.0) -> Tensor:
    d = deltas.double()
    if topk < 1:
        variance = d.var(0, unbiased=False)
        k = int(topk * int((variance != 0).sum()))
        mask = torch.zeros(variance.numel(), dtype=torch.bool)
        mask[variance.flatten().topk(k).indices] = True
        d = d * mask.reshape(variance.shape)
    w = d.square().mean((1, 2))
    w = (w / w.sum()).reshape(-1, 1, 1)
    agree = torch.where(d.sum(0) >= 0, 1, -1) == d.sign()
    return ((w * agree * d).sum(0) / (w * agree).sum(0).clamp(min=1e-9)).float()


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.13])
def test_the_three_steps(topk):
    deltas = torch.stack([X[1], 0.3 * X[2], 2 * X[3], 0.1 * X[4]])
    assert torch.allclose(sce(*deltas, select_topk=topk), by_hand(deltas, topk), atol=1e-6)


def test_entries_that_do_not_differ_do_not_count():
    a, b = torch.ones(2, 4), torch.ones(2, 4)
    b[0] = torch.tensor([2.0, 3.0, 4.0, 5.0])
    assert (sce(a, b, select_topk=0.5) != 0).tolist() == [[False, False, True, True], [False] * 4]
    assert sce(a, b, select_topk=0.2).abs().max() == 0  # int(0.2 4) entries
    assert sce(a, b, select_topk=0.0).abs().max() == 0


def test_small_changes_weigh_the_same_unless_told_otherwise():
    a, b = torch.full((2, 2), 1e-4), torch.full((2, 2), 3e-4)
    assert torch.allclose(sce(a, b), torch.full((2, 2), 2e-4))
    assert torch.allclose(sce(a, b, equal_below=0.0), torch.full((2, 2), 2.8e-4))  # (1 1 + 9 3) / 10
    assert torch.allclose(sce(a * 100, b * 100), torch.full((2, 2), 2.8e-2))


def test_a_tie_counts_as_plus():
    assert sce(torch.tensor([[1.0, -2.0]]), torch.tensor([[-1.0, 2.0]])).tolist() == [[1.0, 2.0]]
