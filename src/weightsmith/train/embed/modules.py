"""The losses for Sentence Transformers: `SentenceTransformerTrainer(..., loss={"nli": ..., "sts": ...})`.

Nothing here imports that library: a model is whatever maps a dict of features to one with `sentence_embedding`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from weightsmith.core.errors import PlanError
from weightsmith.train.embed.gather import first_row, gather
from weightsmith.train.embed.losses import info_nce, similarity

__all__ = ["RetrievalLoss", "SimilarityLoss"]

Features = Iterable[dict[str, Tensor]]


class _Loss(nn.Module):
    """A loss that holds its model, as the library's own do."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any], cross_device: bool) -> None:
        super().__init__()
        self.model, self.options, self.cross_device = model, dict(options), cross_device

    def embed(self, features: Features) -> list[Tensor]:
        """Unit vectors [n, d] of each column, in float32 at least."""
        made = [self.model(column)["sentence_embedding"] for column in features]
        return [normalize(e.float() if e.dtype in (torch.float16, torch.bfloat16) else e, dim=1) for e in made]

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card of the library shows."""
        return {**self.options, "cross_device": self.cross_device}


class RetrievalLoss(_Loss):
    """`info_nce` of columns anchor, positives, negatives, in this order.

    cross_device  passages of all ranks are candidates, with gradients
    """

    def __init__(
        self, model: nn.Module, positives: int = 1, temperature: float = 0.02, cross_device: bool = True
    ) -> None:
        super().__init__(model, {"positives": positives, "temperature": temperature}, cross_device)

    def forward(self, sentence_features: Features, labels: Tensor | None = None) -> Tensor:
        """A scalar; labels are not used."""
        query, *passages = self.embed(sentence_features)
        if len(passages) < self.options["positives"]:
            raise PlanError([f"expected {self.options['positives']} columns of positives, got {len(passages)}"])
        stacked = torch.stack(passages, 1)  # [n, positives + negatives, d]
        if not self.cross_device:
            return info_nce(query, stacked, **self.options)
        return info_nce(query, gather(stacked), **self.options, first=first_row(len(query)))


class SimilarityLoss(_Loss):
    """`similarity` of two columns and a score; cross_device compares the pairs of all ranks."""

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        w_pearson: float = 2.0,
        w_kl: float = 5.0,
        w_pro: float = 0.5,
        cross_device: bool = False,
    ) -> None:
        weights = {"w_pearson": w_pearson, "w_kl": w_kl, "w_pro": w_pro}
        super().__init__(model, {"temperature": temperature, **weights}, cross_device)

    def forward(self, sentence_features: Features, labels: Tensor) -> Tensor:
        """A scalar for scores [n]."""
        columns = self.embed(sentence_features)
        if len(columns) != 2:
            raise PlanError([f"expected two columns of texts, got {len(columns)}"])
        predicted = (columns[0] * columns[1]).sum(1)
        if self.cross_device:
            predicted, labels = gather(predicted), gather(labels)
        return similarity(predicted, labels.flatten(), **self.options)
