"""What is minimised: a pure function of what a model gives for a batch, and the batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from weightsmith.core.errors import SourceError
from weightsmith.tune.registry import Named

__all__ = ["Batch", "Objective", "labels_of", "logits_of", "mean_of"]


@dataclass(frozen=True, eq=False)
class Batch:
    """inputs: [batch, ...]; mask: [batch, tokens] bool, False at padding, or None; labels: [batch] int64, or None."""

    inputs: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Objective(Named):
    """A loss; a step descends its sum over tasks, curves and validation show the mean over them.

    judged     what validation shows, in a word or two
    labelled   whether it needs labels
    collapses  whether a constant answer is an optimum: the classes that are predicted are then watched
    """

    judged: ClassVar[str] = "loss"
    labelled: ClassVar[bool] = False
    collapses: ClassVar[bool] = False

    @abstractmethod
    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        """The mean over a batch, []."""

    def measure(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        """What validation looks at, the mean over a batch, []."""
        return self.loss(outputs, batch, task)

    def judge(self, first: Mapping[str, float], now: Mapping[str, float]) -> float:
        """How bad numbers are, by the measures of the tasks: at the start, and with them; Inf: not to be taken."""
        return sum(now.values()) / len(now)

    def ended(self, first: Mapping[str, float], now: Mapping[str, float]) -> str:
        """Why to stop here, or ''."""
        return ""


def logits_of(outputs: Any) -> Tensor:
    """The scores among what a model gives: [batch, classes] or [batch, tokens, classes]."""
    logits: Tensor = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise SourceError("the model gives no scores of classes; pass a function (module, batch) -> logits")
    if logits.shape[-1] < 2:
        raise SourceError("the model has one output (a regression?): entropy and labels need scores of classes")
    return logits


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: its `labels`, or the second of a pair."""
    found = batch.get("labels") if isinstance(batch, dict) else getattr(batch, "labels", None)
    if found is None and isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise SourceError("this objective needs labels, and the batch has none")
    return found


def mean_of(values: Tensor, batch: Any) -> Tensor:
    """The mean over a batch, padding left out: [batch] or [batch, tokens] -> []."""
    mask = getattr(batch, "mask", None)
    if values.ndim < 2 or mask is None:
        return values.mean()
    wanted: Tensor = mask.to(values.device, values.dtype)
    return (values * wanted).sum() / wanted.sum().clamp(min=1)
