"""One model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.checks import at_most
from weightsmith.core.kernel import WeightedSum
from weightsmith.core.method import number
from weightsmith.ops.combine import Summed

__all__ = ["Passthrough"]


@dataclass(frozen=True)
class Passthrough(Summed, name="passthrough", checks=(at_most(1),)):
    """Take one model's own tensors, for models put together of slices or modules.

    They are multiplied by `scale`.
    Other scales than 1 for some tensors weaken or silence parts of a block (o_proj and down_proj at 0 make it pass
    its input on).  The base takes no part.
    """

    paper = "as in mergekit"

    scale: float = number(1.0, "factor of the tensor", smooth=True)

    def fused(self, count: int) -> WeightedSum:
        return WeightedSum((1.0 * self.scale,))  # 1.0 *: an integer in a recipe is a float here
