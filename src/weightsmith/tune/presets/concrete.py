"""A mask over the task vectors, by the entropy of unlabelled inputs."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.tune.descent import Descent
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["Concrete"]


@dataclass(frozen=True)
class Concrete(Preset, name="concrete"):
    """Learn one mask for all task vectors, a number per weight, that makes the answers confident.

    Source: Concrete Subspace Learning (Tang et al., 2023), with task arithmetic under the mask.  At every step
    m = sigmoid((x + log u - log(1 - u)) / temperature), u uniform, divided by its mean over the tensor;
    theta = theta_0 + scaling sum_k m tau_k.  The authors' result is one more random draw; here it is the mean mask
    sigmoid(x), divided by its mean.  Their variant with learned coefficients (a step inside each step) is not built.

    The file of coefficients is as large as the model in float32, and learning holds three times that.
    """

    scaling: float = 0.3
    logits: float = 0.0
    temperature: float = 0.5
    lr: float = 1e-3
    steps: int = 2000
    seed: int = 0

    def setting(self, models: tuple[str, ...]) -> Setting:
        mask = Free(per="entry", start=self.logits, link="concrete", shared=True, temperature=self.temperature,
                    seed=self.seed)  # fmt: skip
        return Setting(
            free={"factor": mask},
            objective=Entropy(),
            descent=Descent("adam", lr=self.lr, steps=self.steps),
            method=("scale", {"task_arithmetic": {"lambda": self.scaling}}),
        )
