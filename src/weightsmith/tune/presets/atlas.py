"""Anisotropic coefficients of task vectors, from labels."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.errors import RecipeError
from weightsmith.tune.descent import Descent
from weightsmith.tune.objective import Objective
from weightsmith.tune.objectives.forget import Forget
from weightsmith.tune.objectives.labels import Labels
from weightsmith.tune.objectives.pseudo import Pseudo
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["Atlas"]


@dataclass(frozen=True)
class Atlas(Preset, name="atlas"):
    """Learn a coefficient per task vector and tensor from labels, starting at the base.

    Source: aTLAS (Zhang et al., NeurIPS 2024), arXiv:2407.02880.  The task vectors may come from other tasks than those
    of the data.  Weight decay 0.1 pulls coefficients to the base, as in the paper's runs.

    goal        addition: all tasks of the data; negation: forget the task `target`, keep the others; few_shot: addition
                with the paper's learning rate for a few examples and a cosine schedule; test_time: no labels, the
                objective `pseudo`
    budget      task vectors of each tensor that are learned, those with the largest gradient at the start; the others
                stay at `init`.  0: all
    partition   K groups of every matrix, a coefficient each (aTLAS x K); biases, norms and convolutions then stay at
                the base, as in the authors' code.  The authors share a mask between tensors of one shape; here each
                tensor has its own, from the recipe's seed
    """

    goal: str = "addition"
    target: str = ""
    partition: int = 0
    budget: int = 0
    init: float = 0.0
    lr: float = 0.0
    steps: int = 500

    def setting(self, models: tuple[str, ...]) -> Setting:
        goals = ("addition", "negation", "few_shot", "test_time")
        if self.goal not in goals:
            raise RecipeError(f"preset atlas: goal {self.goal!r} is unknown; known: {', '.join(goals)}")
        if (self.goal == "negation") != bool(self.target):
            raise RecipeError(
                "preset atlas: goal negation needs 'target', the task to forget, and no other goal has one"
            )
        if self.budget < 0 or self.partition < 0:
            raise RecipeError("preset atlas: budget and partition are counts; got "
                              f"{self.budget} and {self.partition}")  # fmt: skip
        own: dict[str, Objective] = {"negation": Forget(self.target), "test_time": Pseudo()}
        objective = own.get(self.goal, Labels())
        rate = self.lr or (1e-1 if self.goal == "few_shot" else 1e-3)
        schedule = "cosine" if self.goal in ("few_shot", "test_time") else "constant"
        method: tuple[object, ...] = ("task_arithmetic",)
        free = {"weight": Free(per="tensor", start=self.init)}
        if self.partition:
            method = ({"scale": {"by": "group"}}, "task_arithmetic")
            free = {"factor": Free(per="group", parts=self.partition, start=self.init)}
        return Setting(
            free=free,
            objective=objective,
            descent=Descent("adamw", lr=rate, steps=self.steps, weight_decay=0.1, clip=1.0, schedule=schedule),
            method=method,
            matrices=bool(self.partition),
            budget=self.budget,
        )
