"""A small denoiser with a time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kit import noise


class Denoiser(nn.Module):
    """Images [batch, 1, 4, 4] and times [batch] -> noise; `down` and `up` are its blocks."""

    def __init__(self, seed: int, width: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))
        self.down = nn.Conv2d(channels, width, 3, padding=1)
        self.up = nn.Conv2d(width, channels, 3, padding=1)
        for i, p in enumerate(self.parameters()):
            p.data = 0.4 * noise(*p.shape, seed=100 * seed + i)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.3])
        embedded = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1))
        return self.up(torch.tanh(self.down(x) + embedded[:, :, None, None]))


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    return noise(size, 1, 4, 4, seed=seed), math.pi * noise(size, seed=seed + 1).abs()
