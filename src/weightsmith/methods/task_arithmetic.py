"""Scaled sum of task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightsmith.core.kernel import WeightedSum
from weightsmith.core.method import BASE, Each, Pass, flag, number
from weightsmith.ops.combine import (
    Summed,
    normaliser,
    shown_shares,
    spread,
    usable_weights,
)
from weightsmith.ops.length import AUTO, Lengthened

__all__ = ["TaskArithmetic", "scaled_mean"]


@dataclass(frozen=True)
class TaskArithmetic(Lengthened, Summed, name="task_arithmetic", needs=(BASE,), checks=(usable_weights, shown_shares)):
    """Add the models' changes to the base, scaled by lambda.

    Result: base + lambda sum_i w_i (x_i - base).
    lambda 1/n with equal weights is the average.  Good values fall with the number of models: about 0.4 for
    2, 0.3 for 8, below 0.2 for 20.  auto makes each tensor's merged change as long as a mean expert's
    (`ops.length`): 1/sqrt(n) for n orthogonal task vectors of one length.

    A negative weight subtracts a task (forgetting); weights (1, 1, -1) of C, B and A make the analogy C + (B - A).
    Always float32, also for bf16 models.
    """

    paper = "Editing Models with Task Arithmetic (Ilharco et al., ICLR 2023), arXiv:2212.04089"

    weight: Each = number(1.0, "factor of each task vector", each=True, smooth=True)
    lambda_: float | str = number(1.0, "factor of their sum", options=(AUTO,), smooth=True)
    normalize: bool = flag(False, "divide by the sum of the weights")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return self.lengths()

    def fused(self, count: int) -> WeightedSum:
        weights = spread(self.weight, count)
        divisor = normaliser(weights, self.normalize)
        # 1.0 *: lambda may be an integer, or a tensor in the gradient pass.
        scale = 1.0 if self.length is not None else 1.0 * self.lambda_  # type: ignore[operator]
        return WeightedSum(weights, divisor=divisor, scale=scale, deltas=True, factor=self.length)


def scaled_mean(stage: Any) -> TaskArithmetic:
    """base + scaling mean_t(tau_t): what a spectral method with `scaling` does with tensors that are no matrices."""
    if isinstance(stage.scaling, tuple):
        return TaskArithmetic(weight=stage.scaling, lambda_=1 / len(stage.scaling))
    return TaskArithmetic(lambda_=stage.scaling, normalize=True)  # the sum of weights 1 becomes the mean
