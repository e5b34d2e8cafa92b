"""The position between embedding models."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.tune.descent import Descent
from weightsmith.tune.objectives.contrast import Contrast
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["SelfPositioning"]


@dataclass(frozen=True)
class SelfPositioning(Preset, name="self_positioning"):
    """Learn where between the models, and how far from the base, an embedding model is best.

    Source: Self Positioning (Li et al., 2024), arXiv:2410.15035; a reconstruction: no reference implementation was
    found.  theta = theta_0 + s sum_k w_k tau_k with w = softmax(v) and a scale s in [0, 2]; contrastive batches of one
    task at a time, tasks in turn, so that none outweighs the others.
    """

    lr: float = 1e-2
    steps: int = 500
    momentum: float = 0.9
    temperature: float = 0.05

    def setting(self, models: tuple[str, ...]) -> Setting:
        return Setting(
            free={
                "weight": Free(per="model", start=1 / len(models), link="softmax"),
                "lambda": Free(per="model", start=1.0, link="clamp", low=0.0, high=2.0, shared=True),
            },
            objective=Contrast(self.temperature),
            descent=Descent("sgd", lr=self.lr, steps=self.steps, momentum=self.momentum),
            method=("task_arithmetic",),
            turns=True,
        )
