"""A mask over the task vectors, by the entropy of unlabelled inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.tune.descent import Descent
from weightsmith.tune.objectives.entropy import Entropy
from weightsmith.tune.setting import Ahead, Found, Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["Concrete"]

INNER = {"task_arithmetic": "", "tsvm": "", "task_wise": "model", "layer_wise": "tensor"}
"""What is merged under the mask -> how finely its coefficients are learned."""


@dataclass(frozen=True)
class Concrete(Preset, name="concrete"):
    """Learn one mask for all task vectors, a number per weight, that makes the answers confident.

    Source: Concrete Subspace Learning (Tang et al., 2023).  At every step
    m = sigmoid((x + log u - log(1 - u)) / temperature), u uniform, divided by its mean over the tensor;
    theta = theta_0 + sum_k lambda_k m tau_k.  The authors' result is one more random draw; here it is the mean mask
    sigmoid(x), divided by its mean.  The file of coefficients is as large as the model in float32, and learning holds
    three times that.

    inner    task_arithmetic: all lambda_k are `scaling`.  tsvm: the mask lies over what tsvm makes of the task vectors,
             with its own factor (`scaling` is not used).  task_wise, layer_wise (Concrete AdaMerging): before every
             step of the mask the coefficients take one of their own, at `base_lr`, and are put back to `scaling`
             after it; then the mask stays as it is, and AdaMerging learns them in `adamerging_steps`
    scaling  coefficient, or the start of learned ones
    logits   where x starts
    """

    inner: str = "task_arithmetic"
    scaling: float = 0.3
    logits: float = 0.0
    temperature: float = 0.5
    lr: float = 1e-3
    base_lr: float = 1.0
    steps: int = 2000
    adamerging_steps: int = 1000
    adamerging_lr: float = 1e-3
    seed: int = 0

    def setting(self, models: tuple[str, ...]) -> Setting:
        if self.inner not in INNER:
            raise RecipeError(f"preset concrete: inner {self.inner!r} is unknown{did_you_mean(self.inner, INNER)}")
        mask = Free(per="entry", start=self.logits, link="concrete", shared=True, temperature=self.temperature,
                    seed=self.seed)  # fmt: skip
        plain = Setting(
            free={"factor": mask},
            objective=Entropy(),
            descent=Descent("adam", lr=self.lr, steps=self.steps),
            method=("scale", {"task_arithmetic": {"lambda": self.scaling}}),
        )
        if self.inner == "task_arithmetic":
            return plain
        if self.inner == "tsvm":
            return replace(plain, first=("tsvm",), method=("scale", "task_arithmetic"))
        weight = Free(per=INNER[self.inner], start=self.scaling)
        then = UnderTheMask(replace(weight, link="clamp", low=0.0, high=1.0), self.adamerging_lr, self.adamerging_steps)
        ahead = Ahead(("weight",), Descent("adam", lr=self.base_lr))
        free = {"factor": mask, "weight": weight}
        return replace(plain, method=("scale", "task_arithmetic"), free=free, ahead=ahead, then=then)


@dataclass(frozen=True)
class UnderTheMask:
    """AdaMerging with the mask that the first tuning found."""

    weight: Free
    lr: float
    steps: int

    def __call__(self, setting: Setting, found: Found) -> Setting:
        descent = Descent("adam", lr=self.lr, steps=self.steps)
        given = {"factor": found.coefficients["factor"]}
        return replace(setting, free={"weight": self.weight}, given=given, ahead=None, descent=descent)
