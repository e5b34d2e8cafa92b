"""Coefficients by the entropy of unlabelled inputs."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.errors import RecipeError
from weightsmith.tune.descent import Descent
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["Adamerging", "AdamergingPp"]


@dataclass(frozen=True)
class Adamerging(Preset, name="adamerging"):
    """Learn a coefficient per model and tensor that makes the merged model's answers confident.

    Source: AdaMerging (Yang et al., ICLR 2024), arXiv:2310.02575.  theta^l = theta_0^l + sum_k lambda_k^l tau_k^l; the
    loss is the sum over tasks of the entropy of their predictions.  The authors clamp in the forward pass, where a
    coefficient outside [0, 1] has no gradient and never returns; here it is put back after every step.

    granularity  layer: per tensor, as in the paper's code; task: one per model
    clamp        the interval, or empty for none (FusionBench)
    """

    granularity: str = "layer"
    init: float = 0.3
    lr: float = 1e-3
    steps: int = 500
    clamp: tuple[float, ...] = (0.0, 1.0)

    def setting(self, models: tuple[str, ...]) -> Setting:
        if self.granularity not in ("layer", "task"):
            raise RecipeError(f"preset {self.name}: granularity {self.granularity!r} is unknown; known: layer, task")
        if len(self.clamp) not in (0, 2):
            raise RecipeError(f"preset {self.name}: clamp takes two numbers, or none ([]); got {list(self.clamp)}")
        low, high = self.clamp or (None, None)
        per = "tensor" if self.granularity == "layer" else "model"
        weight = Free(per=per, start=self.init, link="clamp", low=low, high=high)
        return Setting(
            free={"weight": weight},
            objective=Entropy(),
            descent=Descent("adam", lr=self.lr, steps=self.steps),
            method=(*self.before(), "task_arithmetic"),
        )

    def before(self) -> tuple[object, ...]:
        """The filters before the sum."""
        return ()


@dataclass(frozen=True)
class AdamergingPp(Adamerging, name="adamerging_pp"):
    """Learn coefficients as adamerging does, of task vectors that are trimmed and agree in sign.

    Source: AdaMerging++ (Yang et al., ICLR 2024).  keep_percent of each task vector, counted over the whole model.
    """

    keep_percent: float = 20.0

    def before(self) -> tuple[object, ...]:
        return ({"agree": {"density": self.keep_percent / 100}},)
