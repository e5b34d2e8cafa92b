"""One task forgotten, another kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from weightsmith.tune.objective import Objective, labels_of, logits_of
from weightsmith.tune.objectives.labels import Labels

__all__ = ["Forget"]


@dataclass(frozen=True)
class Forget(Objective, name="forget"):
    """Maximise the cross-entropy of the task `target`, and minimise that of the others.

    Source: aTLAS (Zhang et al., NeurIPS 2024), task negation: loss = -CE(target) + CE(control).  Validation looks at
    accuracies: the numbers with the lowest of the target are taken among those at which every other task keeps the
    share `keep` of its accuracy at the start; where one falls below, learning stops.
    """

    judged: ClassVar[str] = "accuracy to forget"
    labelled: ClassVar[bool] = True
    target: str = ""
    keep: float = 0.95

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        found = Labels().loss(outputs, batch, task)
        return -found if task == self.target else found

    def measure(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        """The accuracy."""
        logits, labels = logits_of(outputs), labels_of(batch).to(logits_of(outputs).device)
        return (logits.argmax(dim=-1) == labels)[labels != -100].double().mean()

    def judge(self, first: Mapping[str, float], now: Mapping[str, float]) -> float:
        return math.inf if self._lost(first, now) else now.get(self.target, 0.0)

    def ended(self, first: Mapping[str, float], now: Mapping[str, float]) -> str:
        if lost := self._lost(first, now):
            return f"the accuracy of {lost} fell from {first[lost]:.4g} to {now[lost]:.4g}, below {self.keep:g} of it"
        return ""

    def _lost(self, first: Mapping[str, float], now: Mapping[str, float]) -> str:
        kept = (task for task in now if task != self.target)
        return next((task for task in kept if now[task] < self.keep * first.get(task, 0.0)), "")
