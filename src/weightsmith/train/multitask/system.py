"""A way to do several tasks with one model: what it is trained by, and how it answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss

from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.metrics import score

__all__ = ["Heads", "System"]


class System(nn.Module):
    """base: the shared model; own: all that the mechanism adds to it.

    trains_base  whether the base's weights change, so that the result is a model
    """

    trains_base = True

    def __init__(self, body: Body, tasks: Tasks) -> None:
        super().__init__()
        self.body, self.tasks = body, tasks
        self.base: nn.Module = body.module
        self.own = nn.ModuleDict()
        self.notes: list[str] = []  # what was done to the data, in words

    @abstractmethod
    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        """The summed loss of examples of one task, and over how many examples, tokens or pixels."""

    @abstractmethod
    def predict(self, task: Task, pairs: Sequence[Pair]) -> list[Answer]:
        """Answers of the task's kind."""

    def told(self) -> Mapping[str, Any]:
        """Figures of the trained system for its report."""
        return {}

    @torch.no_grad()
    def score(self, task: Task, pairs: Sequence[Pair], batch: int) -> float:
        """The task's metric."""
        found: list[Answer] = []
        for start in range(0, len(pairs), batch):
            found += self.predict(task, pairs[start : start + batch])
        wanted: list[Any] = [pair.answer for pair in pairs]
        if task.kind == "map":
            if not all(bool(torch.isfinite(f).all()) for f in found if isinstance(f, Tensor)):
                raise NumericError(f"task {task.name!r}: answers are not finite; lower the learning rate")
            return score(task.metric, found, wanted, [task.counts(w) for w in wanted])
        if task.kind == "label" and task.metric != "accuracy":
            return score(task.metric, [task.text(a) for a in found], [task.text(w) for w in wanted])
        return score(task.metric, found, wanted)


class Heads(nn.Module):
    """A linear layer for each task: classes of a pooled feature, or channels of a map at every pixel."""

    def __init__(self, tasks: Tasks, width: int, who: str) -> None:
        super().__init__()
        for task in tasks.values():
            if task.kind == "text":
                raise RecipeError(
                    f"task {task.name!r} answers in texts, for which {who} has no head; name its candidates"
                )
        self.names = list(tasks)  # names of modules may hold no dots
        self.layers = nn.ModuleList(
            nn.Linear(width, max(task.classes, 2 if task.kind == "label" else 1)) for task in tasks.values()
        )

    def forward(self, task: Task, tokens: Tensor, mask: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """tokens [batch, n, width] -> logits [batch, classes], or a map [batch, channels, H, W]."""
        layer: Any = self.layers[self.names.index(task.name)]
        if task.kind == "map":
            if grid is None:
                raise RecipeError(
                    f"task {task.name!r} wants maps, which this model does not give at every pixel; use net:"
                )
            y: Tensor = layer(tokens).transpose(1, 2)
            return y.reshape(*y.shape[:2], *grid)
        if mask is None:
            pooled = tokens.mean(1)
        else:
            kept = mask.unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * kept).sum(1) / kept.sum(1)
        logits: Tensor = layer(pooled)
        return logits


def head_loss(task: Task, out: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
    """Cross-entropy of labels, or L1 of the pixels that have one; summed."""
    if task.kind == "label":
        labels = torch.tensor([pair.answer for pair in pairs], device=out.device)
        return cross_entropy(out.float(), labels, reduction="sum"), len(pairs)
    target = targets(task, pairs, out)
    valid = task.counts(target)
    return l1_loss(out.float()[valid], target[valid], reduction="sum"), int(valid.sum())


def targets(task: Task, pairs: Sequence[Pair], out: Tensor) -> Tensor:
    """Maps of examples [batch, channels, H, W], of the output's shape."""
    target = torch.stack([pair.answer for pair in pairs if isinstance(pair.answer, Tensor)]).to(out.device)
    if target.shape != out.shape:
        raise RecipeError(
            f"task {task.name!r}: maps of shape {tuple(target.shape[1:])}, but the model gives {tuple(out.shape[1:])}; "
            "give all tasks maps of one shape, the images'"
        )
    return target


def head_answers(task: Task, out: Tensor) -> list[Answer]:
    """The likeliest classes, or the maps."""
    return list(out.argmax(-1).tolist()) if task.kind == "label" else list(out.float().cpu())
