"""Right answers, from labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from weightsmith.tune.objective import Objective, labels_of, logits_of

__all__ = ["Labels"]


@dataclass(frozen=True)
class Labels(Objective, name="labels"):
    """Minimise the cross-entropy with the labels of a few examples.

    Labels are classes [batch], or tokens [batch, tokens] where -100 counts as none, as in transformers.
    """

    labelled: ClassVar[bool] = True

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        logits, labels = logits_of(outputs), labels_of(batch)
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten())
