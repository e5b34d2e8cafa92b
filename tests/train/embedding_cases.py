"""A linear encoder and a batch of eight, whole or in two halves; steps of several tasks on one or two ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kit import noise
from weightsmith.train.embed import RetrievalLoss, SimilarityLoss
from weightsmith.train.multitask import MTAdamW, MultiTaskSampler

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


def of_tasks(
    ranks: int, rank: int, batch: int, average: Callable[[Tensor], object] = lambda gradient: None
) -> tuple[list[str], list[list[int]], Tensor]:
    """Tasks, rows and the weights after six unmixed steps of task-balanced AdamW; `average` sees every gradient."""
    lengths = {"a": 30, "b": 11}
    rows = noise(41, 6, seed=3, dtype=torch.float64)
    sampler = MultiTaskSampler(lengths, steps=6, batch=batch, ranks=ranks, rank=rank, seed=4)
    encoder, tasks, seen = model(), [], []
    optimizer = MTAdamW(encoder.parameters(), lr=0.1)
    for step in range(1, 7):
        (task,), (own,) = [sampler.task(step) or ""], sampler.micro_batches(step)
        nn.functional.linear(rows[own], encoder.weight).square().mean().backward()
        assert encoder.weight.grad is not None
        average(encoder.weight.grad)
        optimizer.step(task=task, rate=sampler.rates[task])
        optimizer.zero_grad()
        tasks.append(task)
        seen.append(own)
    return tasks, seen, encoder.weight.detach()
