"""Permutations learned through the loss of the midpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit import noise
from weightsmith.align.match import match
from weightsmith.align.ste import straight_through
from weightsmith.align.traced import traced
from weightsmith.core.errors import RecipeError
from weightsmith.core.symmetry import permute

X = noise(64, 6)
Y = (X[:, :3] * X[:, 3:]).argmax(1)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).eval()


def loss(run: Callable[..., Tensor], batch: Any) -> Tensor:
    return nn.functional.cross_entropy(run(X[batch]), Y[batch])


def test_a_shuffled_copy_costs_nothing() -> None:
    a = net(0)
    groups = traced(a, X).groups
    order = np.random.default_rng(0).permutation(10)
    b = {**a.state_dict(), **permute(a.state_dict(), groups[0], order)}
    found = straight_through(a, groups, a.state_dict(), b, [range(64)] * 3, loss)
    assert (order[found.orders[groups[0].name]] == np.arange(10)).all()
    assert found.loss == pytest.approx(loss(a, range(64)).item())
    assert len(found.losses) == 3


def test_the_lowest_loss_seen_is_returned_and_it_is_learned() -> None:
    a, b = net(0), net(1)
    groups = traced(a, X).groups
    before = {n: t.clone() for n, t in a.state_dict().items()}
    found = straight_through(a, groups, a.state_dict(), b.state_dict(), [range(64)] * 60, loss, lr=0.3)
    assert found.loss == min(found.losses)
    assert found.loss < found.losses[0]  # that of weight matching
    assert (match(groups, a.state_dict(), b.state_dict()).orders[groups[0].name] != found.orders[groups[0].name]).any()
    state = {**b.state_dict(), **permute(b.state_dict(), groups[0], found.orders)}
    a.load_state_dict({n: (before[n] + state[n]) / 2 for n in state})
    assert loss(a, range(64)).item() == pytest.approx(found.loss)


def test_no_batches() -> None:
    a = net(0)
    with pytest.raises(RecipeError, match="no batch to learn a permutation from"):
        straight_through(a, traced(a, X).groups, a.state_dict(), a.state_dict(), [], loss)
