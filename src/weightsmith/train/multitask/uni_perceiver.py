"""Every task as the likelihood of an answer among candidates that the same model encodes (Uni-Perceiver v2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.likelihood import (
    Temperature,
    candidate_loss,
    candidate_scores,
    in_batch_loss,
)
from weightsmith.train.multitask.recipe import UniPerceiver
from weightsmith.train.multitask.system import System

__all__ = ["Likelihood"]


class Likelihood(System):
    """cos(f(x), f(y)) / tau over a task's candidates; without candidates the batch's own answers, as in retrieval."""

    def __init__(self, body: Body, tasks: Tasks, given: UniPerceiver) -> None:
        super().__init__(body, tasks)
        if "text" not in body.reads:
            raise RecipeError(
                f"uni_perceiver encodes answers as texts, but {body.loaded.label} reads {body.reads} only"
            )
        for task in tasks.values():
            if task.spec.candidates is None and task.kind != "text":
                raise RecipeError(f"task {task.name!r} has no candidates: name its classes in words")
            for name in task.spec.candidates or ():
                if (spare := body.spare(name)) < 0:
                    raise RecipeError(
                        f"task {task.name!r}: candidate {name!r} is {-spare} tokens longer than {body.loaded.label} "
                        "reads; shorten it, or raise length"
                    )
        self.own["tau"] = Temperature(given.tau).to(body.device)

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        inputs, tau = self.body.features([pair.input for pair in pairs]), self.own["tau"]()
        if task.spec.candidates is None:
            answers = [str(pair.answer) for pair in pairs]
            return in_batch_loss(inputs, self.body.features(answers), answers, tau), len(pairs)
        labels = torch.tensor([pair.answer for pair in pairs], device=inputs.device)
        return candidate_loss(inputs, self.body.features(task.spec.candidates), labels, tau), len(pairs)

    def predict(self, task: Task, pairs: Sequence[Pair]) -> list[Answer]:
        """The best candidate; in retrieval, among all answers of the task's evaluated examples."""
        names = task.spec.candidates or tuple(
            dict.fromkeys(str(p.answer) for part in task.parts.values() for p in part)
        )
        scores = candidate_scores(self.body.features([p.input for p in pairs]), self.body.features(names), 1.0)
        best = scores.argmax(-1).tolist()
        return best if task.spec.candidates is not None else [names[i] for i in best]

    def told(self) -> Mapping[str, Any]:
        return {"temperature": float(self.own["tau"]().detach())}
