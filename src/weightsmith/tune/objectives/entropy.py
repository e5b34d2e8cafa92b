"""Confident answers, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from weightsmith.tune.objective import Objective, logits_of, mean_of

__all__ = ["Entropy"]


@dataclass(frozen=True)
class Entropy(Objective, name="entropy"):
    """Minimise the entropy of the predicted classes; needs inputs only.

    Source: AdaMerging (Yang et al., ICLR 2024), equation 5.  Of a language model: of the next token, averaged over
    positions that are no padding (an extension).  A constant answer is an optimum too.
    """

    collapses: ClassVar[bool] = True

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        logs = logits_of(outputs).log_softmax(dim=-1)
        return mean_of(-(logs.exp() * logs).sum(dim=-1), batch)
