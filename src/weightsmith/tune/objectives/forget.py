"""One task forgotten, another kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from weightsmith.tune.objective import Objective
from weightsmith.tune.objectives.labels import Labels

__all__ = ["Forget"]


@dataclass(frozen=True)
class Forget(Objective, name="forget"):
    """Maximise the cross-entropy of the task `target`, and minimise that of the others.

    Source: aTLAS (Zhang et al., NeurIPS 2024), task negation: loss = -CE(target) + CE(control).
    """

    labelled: ClassVar[bool] = True
    target: str = ""

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        found = Labels().loss(outputs, batch, task)
        return -found if task == self.target else found
