"""A linear encoder and a batch of eight, whole or in two halves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kit import noise
from weightsmith.train.embed import RetrievalLoss, SimilarityLoss

RANKS = 2

LABELS = torch.tensor([5.0, 0.0, 3.0, 3.0, 1.0, 4.0, 0.0, 2.0])


class Encoder(nn.Linear):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": super().forward(features["x"])}


def model() -> Encoder:
    made = Encoder(6, 5, bias=False, dtype=torch.float64)
    made.weight.data = noise(5, 6, dtype=torch.float64)
    return made


def features(column: int) -> Tensor:
    return noise(8, 6, seed=10 + column, dtype=torch.float64)


def losses(encoder: Encoder, cross_device: bool) -> dict[str, tuple[nn.Module, int, Tensor]]:
    """Name -> loss, its columns, scores."""
    return {
        "retrieval": (RetrievalLoss(encoder, 2, 0.3, cross_device=cross_device), 4, LABELS),
        "similarity": (SimilarityLoss(encoder, 0.3, cross_device=cross_device), 2, LABELS),
    }
