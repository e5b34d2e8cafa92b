"""A task as the likelihood of its answer among candidates, which share the model with the inputs (Uni-Perceiver)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from weightsmith.core.errors import RecipeError

__all__ = ["Temperature", "candidate_loss", "candidate_scores", "checked_candidates", "in_batch_loss"]


class Temperature(nn.Module):
    """A learned temperature above 0: its logarithm trains, and the value stays at `least` or above."""

    def __init__(self, value: float = 0.07, least: float = 0.01) -> None:
        super().__init__()
        if not value >= least > 0:
            raise RecipeError(f"temperature must be at least {least:g}, got {value:g}")
        self.log, self.least = nn.Parameter(torch.tensor(math.log(value))), least

    def forward(self) -> Tensor:
        return self.log.exp().clamp_min(self.least)


def candidate_scores(inputs: Tensor, candidates: Tensor, temperature: Tensor | float) -> Tensor:
    """cos(x, y) / temperature [batch, candidates] of features [batch, d] and [candidates, d]."""
    return normalize(inputs.float(), dim=-1) @ normalize(candidates.float(), dim=-1).T / temperature


def candidate_loss(inputs: Tensor, candidates: Tensor, labels: Tensor, temperature: Tensor | float) -> Tensor:
    """The summed -log P(x, y) / sum_z P(x, z) over the candidates z of one task; labels [batch] int64."""
    return cross_entropy(candidate_scores(inputs, candidates, temperature), labels, reduction="sum")


def in_batch_loss(inputs: Tensor, answers: Tensor, keys: Sequence[object], temperature: Tensor | float) -> Tensor:
    """The same with the batch's own answers [batch, d] as candidates; equal keys are no negatives of each other."""
    scores = candidate_scores(inputs, answers, temperature)
    same = torch.tensor([[a == b for b in keys] for a in keys], device=scores.device)
    own = torch.eye(len(keys), dtype=torch.bool, device=scores.device)
    return cross_entropy(
        scores.masked_fill(same & ~own, -math.inf), torch.arange(len(keys), device=scores.device), reduction="sum"
    )


def checked_candidates(task: str, names: Sequence[str]) -> tuple[str, ...]:
    """The candidates; RecipeError for fewer than two, empty ones, or two alike."""
    if len(names) < 2:
        raise RecipeError(f"task {task!r}: candidates need at least two names, got {len(names)}")
    for name in names:
        if not name.strip():
            raise RecipeError(f"task {task!r}: a candidate is empty")
        if sum(other.strip() == name.strip() for other in names) > 1:
            raise RecipeError(f"task {task!r}: candidate {name!r} stands twice; each answer is one candidate")
    return tuple(names)
