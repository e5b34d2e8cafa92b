"""A small classifier, two tasks that need different weights, and an expert for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kit import noise

CLASSES = 3


class Net(nn.Module):
    """Two layers with block numbers, and a head; `tied` names one weight twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, CLASSES)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(layer(x).tanh())
        found: Tensor = self.head(x)
        return found


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def trained(base: Net, data: list[tuple[Tensor, Tensor]], steps: int = 60) -> dict[str, Tensor]:
    """The weights after some steps on a task."""
    model = Net()
    model.load_state_dict(base.state_dict())
    model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def task(seed: int, batches: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Inputs around a place of their own, labels by a plane of their own."""
    planes = noise(4, CLASSES, seed=seed)
    centre = noise(4, seed=seed + 50) * 2
    made = []
    for i in range(batches):
        x = noise(size, 4, seed=1000 * seed + i) + centre
        made.append((x, ((x - centre) @ planes).argmax(1)))
    return made


def world(experts: int = 2) -> tuple[Net, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The base, its experts, and their tasks' batches."""
    base = net()
    data = {f"t{i}": task(i + 1) for i in range(experts)}
    return base, {f"e{i}": trained(base, data[f"t{i}"]) for i in range(experts)}, data
