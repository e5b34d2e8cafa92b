"""A small convolutional network, for tasks on images that need no pre-trained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Net"]


class Net(nn.Module):
    """Residual 3x3 convolutions at full resolution, of any size of image.

    forward: [batch, channels, H, W] -> [batch, out, H, W]; `features`: -> [batch, width, H, W].
    """

    def __init__(self, width: int = 32, depth: int = 4, channels: int = 3, out: int = 3) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=d, dilation=d), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for d in (1 + i % 3 for i in range(depth))
        )
        self.out = nn.Conv2d(width, out, 3, padding=1)

    def features(self, images: Tensor) -> Tensor:
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The features after every block."""
        x, found = self.enter(images), []
        for block in self.blocks:
            x = x + block(x)
            found.append(x)
        return found or [x]

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.out(self.features(images))
        return y

    @classmethod
    def seeded(cls, seed: int, width: int, depth: int, channels: int = 3, out: int = 3) -> Net:
        """The same weights for a seed, and the global random state left alone."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return cls(width, depth, channels, out)
