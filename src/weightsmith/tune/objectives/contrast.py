"""Embeddings of pairs, nearer to each other than to the rest of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.tune.objective import Objective

__all__ = ["Contrast"]


@dataclass(frozen=True)
class Contrast(Objective, name="contrast"):
    """Minimise InfoNCE over pairs: the i-th query's passage is the i-th, the others of the batch are negatives.

    Outputs are a pair (queries [b, d], passages [k b, d]); passages beyond b are hard negatives.  Cosines, divided by
    `temperature`.  Self Positioning (Li et al., 2024, arXiv:2410.15035) says no more of its loss than that it is
    contrastive: this is the common form.
    """

    temperature: float = 0.05

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
            raise SourceError("contrast needs a function (module, batch) -> (queries, passages)")
        queries, passages = (nn.functional.normalize(one, dim=-1) for one in outputs)
        scores = queries @ passages.T / self.temperature
        return nn.functional.cross_entropy(scores, torch.arange(len(queries), device=scores.device))
