"""Optimisers written out over autograd, in float64: what the iterative methods must agree with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def gradient(loss: Loss, at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def adam(loss: Loss, start: Tensor, steps: int, lr: float, project: Loss = lambda g: g) -> Tensor:
    """Kingma and Ba's algorithm 1; `project` is applied to every gradient."""
    x, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, steps + 1):
        g = project(gradient(loss, x))
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        x = x - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return x


def sgd(loss: Loss, start: Tensor, steps: int, lr: float, momentum: float) -> Tensor:
    x, speed = start, torch.zeros_like(start)
    for _ in range(steps):
        speed = momentum * speed + gradient(loss, x)
        x = x - lr * speed
    return x
