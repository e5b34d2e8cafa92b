"""The k likeliest next tokens of each position: what is kept of a model's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from weightsmith.core.errors import PlanError, RecipeError

__all__ = ["TopK", "stacked", "top_k"]


@dataclass(frozen=True, eq=False)
class TopK:
    """Distributions over tokens, cut to the k likeliest.

    ids     int32 [batch, length, k]
    logits  float16 [batch, length, k]; -inf takes no part.  Position t predicts token t + 1
    """

    ids: Tensor
    logits: Tensor

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """softmax(logits / temperature) over the k: float32 [batch, length, k]."""
        return (self.logits.float() / temperature).softmax(-1)

    def to(self, device: torch.device) -> TopK:
        """The same on another device."""
        return TopK(self.ids.to(device), self.logits.to(device))

    @property
    def nbytes(self) -> int:
        """6 bytes per position and token."""
        return self.ids.nbytes + self.logits.nbytes


def top_k(logits: Tensor, k: int) -> TopK:
    """The k largest of logits [batch, length, vocabulary]."""
    if not 1 <= k <= logits.shape[-1]:
        raise RecipeError(f"k must be in 1 .. {logits.shape[-1]} (the vocabulary), got {k}")
    values, ids = logits.detach().topk(k, -1)
    # Relative to the largest, so that float16 neither overflows nor wastes its digits; softmax does not mind.
    return TopK(ids.to(torch.int32), (values - values[..., :1]).to(torch.float16))


def stacked(candidates: Sequence[TopK], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """ids int64 and probabilities float32 [batch, length, candidates, k], with k the largest of theirs."""
    shapes = {tuple(c.ids.shape[:2]) for c in candidates}
    if len(shapes) != 1:
        raise PlanError([f"candidates cover different positions: {sorted(shapes)}; align them first"])
    width = max(c.ids.shape[2] for c in candidates)
    ids = [pad(c.ids.long(), (0, width - c.ids.shape[2])) for c in candidates]
    probabilities = [pad(c.probabilities(temperature), (0, width - c.ids.shape[2])) for c in candidates]
    return torch.stack(ids, 2), torch.stack(probabilities, 2)
