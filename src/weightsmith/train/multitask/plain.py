"""Multi-task training without a mechanism: shared weights, and a head for each task that has labels or maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.recipe import Plain
from weightsmith.train.multitask.system import Heads, System, head_answers, head_loss

__all__ = ["SharedHeads"]


class SharedHeads(System):
    """Mean hidden states of the last level, and linear heads."""

    def __init__(self, body: Body, tasks: Tasks, given: Plain) -> None:
        super().__init__(body, tasks)
        width = body.probe(next(iter(tasks.values()))).levels[-1].shape[-1]
        self.own["heads"] = Heads(tasks, width, "by: plain").to(body.device)

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        return head_loss(task, self._out(task, pairs), pairs)

    def predict(self, task: Task, pairs: Sequence[Pair]) -> list[Answer]:
        return head_answers(task, self._out(task, pairs))

    def _out(self, task: Task, pairs: Sequence[Pair]) -> Tensor:
        found = self.body.hidden([pair.input for pair in pairs])
        out: Tensor = self.own["heads"](task, found.levels[-1], found.mask, found.grid)
        return out
