"""Answers like those of the experts, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.tune.objective import Objective, mean_of
from weightsmith.tune.teachers import Lesson, hidden_of, scores_of

__all__ = ["Imitate"]


@dataclass(frozen=True)
class Imitate(Objective, name="imitate"):
    """Minimise the divergence from each task's own expert: of its predictions, and of chosen hidden states.

    Source: Expert Merging (Zhang et al., 2025), arXiv:2509.25712.  Loss: T^2 KL(expert || merged) at temperature T,
    averaged over positions, + weight * mean over `layers` of the mean squared difference of the hidden states.  The
    paper writes a cross-entropy: KL has the same gradient, and is 0 where the expert is reached.

    top     scores of the expert that are kept for each position, the others as one; 0: all.  At T other than 1 all are
            needed
    layers  hidden states that are compared; 0 is the embeddings' output
    """

    temperature: float = 1.0
    weight: float = 1.0
    layers: tuple[int, ...] = ()
    top: int = 0

    def __post_init__(self) -> None:
        if self.top and self.temperature != 1:
            raise SourceError(f"imitate: temperature {self.temperature:g} needs all scores; set top: 0")

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        if not isinstance(batch, Lesson):
            raise SourceError("imitate needs the experts' answers; run it through weightsmith.tune")
        logits = scores_of(outputs).float()
        if batch.top is None and batch.scores.shape[-1] != logits.shape[-1]:
            raise SourceError(f"imitate: the expert of {task} has {batch.scores.shape[-1]} classes, the merged model "
                              f"{logits.shape[-1]}")  # fmt: skip
        loss = mean_of(self._divergence(logits, batch), batch)
        if self.layers:
            pairs = zip(hidden_of(outputs, self.layers), batch.hidden, strict=True)
            apart = [nn.functional.mse_loss(mine.float(), theirs.to(mine.device)) for mine, theirs in pairs]
            loss = loss + self.weight * torch.stack(apart).mean()
        return loss

    def _divergence(self, logits: Tensor, lesson: Lesson) -> Tensor:
        theirs = lesson.scores.to(logits.device)
        if lesson.top is None:
            theirs = (theirs / self.temperature).log_softmax(dim=-1)
            mine = (logits / self.temperature).log_softmax(dim=-1)
        else:
            mine = logits.log_softmax(dim=-1).gather(-1, lesson.top.to(logits.device))
            rest = (-mine.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-7)).log1p()
            mine = torch.cat([mine, rest], dim=-1)
        return (theirs.exp() * (theirs - mine)).sum(dim=-1) * self.temperature**2
