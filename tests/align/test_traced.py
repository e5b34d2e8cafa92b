"""Symmetries of networks that no table knows: traced, proved, planted and found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit import noise
from weightsmith.align import traced as tracing
from weightsmith.align.match import match
from weightsmith.align.traced import traced
from weightsmith.core.errors import SourceError
from weightsmith.core.symmetry import identity, permute


class Block(nn.Module):
    """A residual block with norms, with a shortcut or a depthwise convolution."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.deep = nn.Conv2d(out, out, 3, 1, 1, groups=out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = (
            nn.Sequential() if into == out else nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(self.deep(y))) + self.short(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Block(6, 6), Block(6, 8, 2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10), nn.GELU(), nn.Linear(10, 4),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))


class Strange(nn.Module):
    """Sorts its hidden units, which no table knows, and multiplies by a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 9), nn.Linear(9, 7), nn.Linear(7, 4)
        self.scale = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cumsum(self.first(x), -1)
        return self.third(torch.relu(self.second(hidden)) * self.scale)


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[int]]] = {
    "mlp": (mlp, noise(3, 12), [9, 7]),
    "resnet": (resnet, noise(2, 3, 8, 8), [6, 6, 8, 8, 10]),
    "strange": (Strange, noise(3, 12), [7]),
}


@pytest.mark.parametrize("name", NETS)
def test_planted_permutations_come_back(name: str) -> None:
    make, x, sizes = NETS[name]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor += 0.3 * torch.rand_like(tensor)
    found = traced(net, x)
    assert sorted(g.size for g in found.groups) == sorted(sizes)
    state, draw = net.state_dict(), np.random.default_rng(1)
    before = {n: t.clone() for n, t in state.items()}
    expected = net(x)
    moved: Any = before
    for group in found.groups:
        moved = {**moved, **permute(moved, group, {n: draw.permuted(o) for n, o in identity(group).items()})}
    net.load_state_dict(moved)
    assert torch.allclose(net(x), expected, atol=1e-5)
    orders = match(found.groups, before, moved).orders
    for group in found.groups:
        moved = {**moved, **permute(moved, group, orders)}
    assert all(torch.equal(moved[n], before[n]) for n in before)


def test_what_is_unknown_is_frozen_and_named() -> None:
    found = traced(Strange(), noise(3, 12))
    assert found.frozen["first"] == "nothing is known of cumsum"
    attention = nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 2))
    assert "nothing is known of 1" in traced(attention, noise(2, 3, 4)).frozen.values()


def test_statistics_of_norms_move_along() -> None:
    names = {name for group in traced(resnet(), noise(2, 3, 8, 8)).groups for name in group.names}
    assert {"1.running_mean", "1.running_var", "4.short.1.running_var", "3.deep.weight"} <= names


def test_a_wrong_trace_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a running sum taken for an operation on single entries, the proof would say no."""
    monkeypatch.setattr(tracing, "_SAME_CALLS", (*tracing._SAME_CALLS, "cumsum"))
    found = traced(Strange(), noise(3, 12))
    assert [g.size for g in found.groups] == [7]
    assert found.frozen["first"].startswith("a permutation changes the outputs (by")


def test_a_layer_used_twice_has_one_permutation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.again, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.into(x))
            return self.out(torch.relu(self.again(torch.relu(self.again(x)))))

    (group,) = traced(Twice(), noise(3, 5)).groups
    assert {(a.name, a.axis) for a in group.axes} >= {("again.weight", 0), ("again.weight", 1)}


def test_the_network_is_not_changed_and_what_cannot_be_traced_is_refused() -> None:
    net = mlp()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    traced(net, noise(3, 12))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(SourceError, match=r"Odd cannot be traced by torch\.fx"):
        traced(Odd(), noise(3, 12))
