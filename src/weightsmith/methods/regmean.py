"""Least-squares merge of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import dims
from weightsmith.core.errors import NumericError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Each, Method, Stage, Whole, flag, number
from weightsmith.core.parameter import is_tensor
from weightsmith.core.site import Site
from weightsmith.ops.combine import some_weight, spread, weighted_sum
from weightsmith.ops.leading import LARGE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Regmean"]

SINGULAR = 1e-12
"""Least share of a column's own energy that may be left of it after all columns before it are projected out."""


@dataclass(frozen=True)
class Regmean(Whole, Method, name="regmean", needs=("gram",), checks=(some_weight, dims(2)), otherwise="linear"):
    """Make each linear layer reproduce what the models' layers give on their own inputs.

    Result: W = (sum_i W_i G_i)(sum_i G_i)^-1.
    W_i [out, in]; G_i [in, in] the Gram matrix X^T X / n of the layer's inputs (statistic "gram"), with
    off-diagonal entries multiplied by `alpha` and the whole by the model's weight.  It minimises
    sum_i |X_i W^T - X_i W_i^T|^2.  Tensors without a Gram get the weighted mean; so does an input column that
    is zero for all models.  Cholesky in float64; a sum without full rank is refused unless `ridge` or
    alpha < 1 make it regular (the authors' code inverts in float32 and returns noise).
    """

    paper = "Dataless Knowledge Fusion by Merging Weights of Language Models (Jin et al., ICLR 2023), arXiv:2212.09849"

    alpha: float = number(
        0.9, "factor of the Grams' off-diagonal entries (reduce_non_diagonal_ratio)", low=0, high=1, smooth=True
    )
    weight: Each = number(1.0, "factor of each model's Gram", low=0, each=True, smooth=True)
    ridge: float = number(0.0, "added to the diagonal of the sum, relative to its mean (try 1e-6)", low=0, smooth=True)
    transposed: bool = flag(False, "weights are stored [in, out], as GPT-2's Conv1D does")

    def informed(self, key: Key, notes: Mapping[str, Mapping[str, Any]]) -> Stage:
        """Layers that the Grams' file lists as stored [in, out] are taken so, also where the matrix is square."""
        return replace(self, transposed=True) if key.name in notes.get("gram", {}).get("transposed", ()) else self

    def merge(self, site: Site) -> Tensor:
        experts = site.experts.transpose(1, 2) if self.transposed else site.experts  # [n, out, in]
        size = experts.shape[2]
        weights = spread(self.weight, site.count)
        grams = [self._gram(site, i, size) for i in range(site.count)]  # [in, in] each
        # An input that is zero in all data: the weighted mean of its weights.
        energy = weighted_sum(torch.stack([gram.diagonal().double() for gram in grams]), weights)
        # 1 on the diagonal of a dead input, for every model: the weights of that column get the weighted mean.
        dead = (energy == 0).to(grams[0].dtype)
        # With the Grams' sum S: W = W_1 + (sum_i (W_i - W_1) G_i) S^-1, which multiplies small differences only.  Their
        # products may be as exact as the Grams are themselves.
        first = experts[0]
        large = site.stack.dtype == grams[0].dtype == torch.float32 and min(first.shape) >= LARGE
        dtype = torch.float32 if large and not site.stack.requires_grad else torch.float64
        # S [in, in] and sum_i (W_i - W_1) G_i [out, in], float64: sums of n matrices of unlike size.
        total = first.new_zeros(size, size, dtype=torch.float64)
        target = first.new_zeros(first.shape, dtype=torch.float64)
        for i, (expert, raw, weight) in enumerate(zip(experts, grams, weights, strict=True)):
            # Off-diagonal entries times alpha, the diagonal as it was.
            gram = raw.to(dtype) * self.alpha
            gram.diagonal().copy_(raw.diagonal() + dead)
            # In place where the weight is a number.
            total = total + gram * weight if is_tensor(weight) else total.add_(gram, alpha=weight)
            if i:
                target = target + ((expert.to(dtype) - first.to(dtype)) @ gram) * weight
        if self.ridge:
            # W S = sum_i W_i G_i + ridge 0: the ridge pulls to 0, in the difference to W_1 therefore to -W_1.
            ridge = self.ridge * total.diagonal().mean()
            total.diagonal().add_(ridge)
            target = target - first.double() * ridge
        # S is symmetric: X S = target is S X^T = target^T.
        moved = torch.cholesky_solve(target.T, self._factor(site, total)).T
        merged = first.double() + moved
        return (merged.T if self.transposed else merged).to(site.stack.dtype).contiguous()

    def _gram(self, site: Site, index: int, size: int) -> Tensor:
        gram = site.stats["gram"][index]
        if gram.shape != (size, size):
            raise NumericError(
                f"{site.key.name}: the Gram matrix has shape {list(gram.shape)}, the weight {list(site.key.shape)} "
                f"wants {[size, size]}; set transposed: true for layers stored [in, out]"
            )
        # A Gram matrix has sums of squares on its diagonal.
        if gram.numel() and not (-torch.inf < gram.amin() and gram.amax() < torch.inf and gram.diagonal().amin() >= 0):
            raise NumericError(f"{site.key.name}: a Gram matrix has negative diagonal entries or is not finite")
        return gram

    def _factor(self, site: Site, total: Tensor) -> Tensor:
        """The Cholesky factor; a sum of Grams without full rank is refused."""
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(total)
        # The square of the factor's diagonal is what is left of a column beside those before it.
        if int(info) or bool((factor.diagonal().square() < SINGULAR * total.diagonal()).any()):
            raise NumericError(
                f"{site.key.name}: the sum of the Gram matrices is singular (fewer examples than the {total.shape[0]} "
                f"inputs?); set ridge (1e-6) or alpha below 1, or observe more data"
            )
        return factor
