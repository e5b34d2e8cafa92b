"""Model Stock: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from driver import every, merge
from torch import Tensor

BASE = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def stock(*deltas: Tensor, base: Tensor | None = None, step: int = 2, **parameters) -> Tensor:
    """The merged task vector."""
    start = torch.zeros_like(deltas[0]) if base is None else base
    models = {f"e{i}": {"w": start + d} for i, d in enumerate(deltas)}
    return merge(models, "model_stock", base={"w": start}, cut=every(step), **parameters)["w"] - start


def unit(index: int, size: float = 1.0) -> Tensor:
    change = torch.zeros(4, 6)
    change.view(-1)[index] = size
    return change


def test_copies_come_back_and_orthogonal_changes_leave_the_base():
    assert torch.allclose(stock(BASE, BASE, BASE), BASE, rtol=1e-5)
    assert stock(unit(0), unit(7), unit(9)).abs().max() == 0
    assert stock(BASE, torch.zeros(4, 6)).abs().max() == 0  # no change stands at a right angle to every change


@pytest.mark.parametrize(("n", "cosine"), [(2, 0.5), (2, -0.3), (3, 0.2), (5, 0.7)])
def test_the_ratio_of_the_paper(n, cosine):
    """n vectors of one pairwise cosine, of unlike lengths."""
    common, rest = math.sqrt(abs(cosine)), math.sqrt(1 - abs(cosine))
    signs = [1 if cosine > 0 or i == 0 else -1 for i in range(n)]
    deltas = [(unit(0) * common * s + unit(i + 1) * rest) * (i + 1) for i, s in enumerate(signs)]
    ratio = n * cosine / (1 + (n - 1) * cosine)
    assert torch.allclose(stock(*deltas), sum(deltas) / n * ratio, atol=1e-6)


def test_any_scale_gives_the_same_ratio():
    deltas = [unit(0) + unit(1), unit(0) + 0.5 * unit(2)]
    for scale in (1e-12, 1e12):
        assert torch.allclose(stock(*(d * scale for d in deltas)) / scale, stock(*deltas), rtol=1e-5)


def test_changes_that_cancel_give_the_base():
    assert stock(BASE, -BASE).abs().max() == 0


def test_filter_wise_is_row_by_row_and_a_vector_is_one_row():
    made = torch.Generator().manual_seed(5)
    deltas = [BASE + 0.5 * torch.randn(4, 6, generator=made) for _ in range(3)]
    got = stock(*deltas, filter_wise=True)
    for row in range(4):
        assert torch.allclose(got[row], stock(*(d[row] for d in deltas)), atol=1e-6)
        assert torch.allclose(got[row], stock(*(d[row] for d in deltas), filter_wise=True), atol=1e-6)
    assert not torch.allclose(got, stock(*deltas), atol=1e-3)
    cube = [d.reshape(2, 2, 6) for d in deltas]
    assert torch.allclose(stock(*cube, filter_wise=True, step=1).reshape(4, 6), got, atol=1e-6)
