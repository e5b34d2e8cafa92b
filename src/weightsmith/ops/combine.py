"""Ways to make one tensor of n: sums, sign elections, means of those that agree.

Stacks are [n, *block].  Experts are added one after another in recipe order, so that every element is the
same for every way to cut the tensor (`stack.sum(0)` is not: its order depends on the block's shape), and
products are rounded before they are added, as on every other device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import Case, Verdict, refuse, remark
from weightsmith.core.kernel import WeightedSum
from weightsmith.core.lazy import torch
from weightsmith.core.method import Each, Method
from weightsmith.core.parameter import is_tensor
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AGGREGATES",
    "SIGN_RULES",
    "Summed",
    "apply_weighted_sum",
    "disjoint",
    "elect_sign",
    "mean",
    "normaliser",
    "per_expert",
    "shown_shares",
    "some_weight",
    "spread",
    "usable_weights",
    "weigh",
    "weighted_sum",
]

SIGN_RULES = ("mass", "normfrac", "normmass", "count")
AGGREGATES = ("mean", "sum", "max")
ZERO_WEIGHT = 1e-8
"""A sum of weights closer to zero than this cannot be divided by."""


def weighted_sum(stack: Tensor | Sequence[Tensor], weights: Sequence[float | Tensor] | None = None) -> Tensor:
    """sum_i w_i x_i in order (w_i = 1 without weights): [n, *block] -> [*block]."""
    if weights is None:
        total = stack[0]
        for i in range(1, len(stack)):
            total = total + stack[i]
        return total
    total = stack[0] * weights[0]
    for i in range(1, len(stack)):
        total = total + stack[i] * weights[i]
    return total


def mean(stack: Tensor) -> Tensor:
    """The plain mean over the experts."""
    return weighted_sum(stack) / stack.shape[0]


def spread(value: Each, count: int) -> tuple[float, ...]:
    """A parameter that is one number or one per expert, as one per expert."""
    if isinstance(value, tuple):
        return value
    return (float(value) if isinstance(value, (int, float)) else value,) * count  # a tensor in the gradient pass


def normaliser(weights: Sequence[float], normalize: bool) -> float:
    """What a weighted sum is divided by: the sum of the weights, or 1."""
    return sum(weights) if normalize else 1.0


# --- checks of the weights (`core.checks`)


def some_weight(stage: Any, case: Case) -> Iterable[Verdict]:
    """The weights are not all 0."""
    some = any(spread(stage.weight, case.count))
    return refuse(None if some else "all weights are 0; give one model a positive weight")


def usable_weights(stage: Any, case: Case) -> Iterable[Verdict]:
    """The sum of the weights can be divided by; `normalize` says whether it is (without it: always)."""
    weights = spread(stage.weight, case.count)
    listed, total = ", ".join(f"{w:g}" for w in weights), sum(weights)
    if not getattr(stage, "normalize", True):
        return ()
    if abs(total) < ZERO_WEIGHT:
        return refuse(f"weights {listed} sum to zero, which cannot be normalized; set normalize: false")
    if total < 0:
        return refuse(
            f"weights {listed} sum to {total:g}: normalizing turns all their signs around; set normalize: false"
        )
    return ()


def shown_shares(stage: Any, case: Case) -> Iterable[Verdict]:
    """What the shares become where a negative weight makes the others larger than they look."""
    weights = spread(stage.weight, case.count)
    if not stage.normalize or min(weights) >= 0 or usable_weights(stage, case):
        return ()
    return remark(f"normalized, the weights are {', '.join(f'{w / sum(weights):.4g}' for w in weights)}")


@dataclass(frozen=True)
class Summed(Method):
    """A method that is one weighted sum."""

    @abstractmethod
    def fused(self, count: int) -> WeightedSum:
        """The sum, for this number of experts."""

    def merge(self, site: Site) -> Tensor:
        return apply_weighted_sum(self.fused(site.count), site)


def apply_weighted_sum(spec: WeightedSum, site: Site) -> Tensor:
    """Carry out a weighted sum in torch: the meaning of the kernels."""
    total = weighted_sum(site.deltas if spec.deltas else site.experts, spec.weights)
    if spec.divisor != 1:
        total = total / spec.divisor
    if not spec.deltas:
        return total
    assert site.base is not None
    return site.base + total * (spec.scale if spec.factor is None else site.result(spec.factor))


def per_expert(values: Tensor | Sequence[float], stack: Tensor) -> Tensor:
    """One number per expert, shaped and typed to multiply a stack: [n] -> [n, 1, ..., 1]."""
    if not is_tensor(values) and any(map(is_tensor, values)):
        values = torch.stack([torch.as_tensor(v, dtype=stack.dtype) for v in values])  # as_tensor would cut gradients
    found = torch.as_tensor(values, device=stack.device).to(stack.dtype)
    return found.reshape(-1, *([1] * (stack.ndim - 1)))


def weigh(stack: Tensor, weights: Sequence[float]) -> Tensor:
    """w_i x_i: [n, *block]; the stack itself where all weights are 1."""
    ones = all(isinstance(w, (int, float)) and w == 1 for w in weights)  # a tensor of 1 still has a gradient
    return stack if ones else stack * per_expert(weights, stack)


def elect_sign(votes: Tensor, rule: str = "mass", norms: Sequence[float] | None = None) -> Tensor:
    """Elect one sign per weight: [n, *block] -> [*block] of -1, 0, 1 in the stack's dtype.

    mass      sign of sum_i v_i
    count     sign of sum_i sign(v_i)
    normmass  sign of sum_i sign(v_i) (v_i / norm_i)^2
    normfrac  sign of the v_i with the largest |v_i| / norm_i (the first of equals)

    `norms` are the experts' L2 norms; an expert of norm 0 has no voice.
    """
    if rule == "mass":
        return weighted_sum(votes).sign()
    if rule == "count":
        return weighted_sum(votes.sign()).sign()
    assert norms is not None
    inverse = [1 / norm if norm > 0 else 0.0 for norm in norms]
    if rule == "normmass":
        total = torch.zeros_like(votes[0], dtype=torch.float64)
        for vote, factor in zip(votes, inverse, strict=True):
            share = vote.double() * factor  # float64: squares of small shares vanish in float32
            total = total + share * share.abs()
        return total.sign().to(votes.dtype)
    best, sign = votes[0].abs().double() * inverse[0], votes[0].sign()
    for i in range(1, votes.shape[0]):
        share = votes[i].abs().double() * inverse[i]
        sign = torch.where(share > best, votes[i].sign(), sign)
        best = torch.maximum(best, share)
    return sign


def disjoint(votes: Tensor, signs: Tensor, weights: Sequence[float], aggregate: str = "mean") -> Tensor:
    """Combine the entries whose sign is the elected one: [n, *block], [*block] of -1, 0, 1 -> [*block].

    votes      w_i delta_i
    aggregate  sum; mean: sum over agreeing v_i / sum over agreeing w_i (a divisor of 0 counts as 1);
               max: the elected sign times the largest agreeing |v_i|
    Zeros never agree, and nothing agrees with an elected sign of 0.
    """
    total, divisor = torch.zeros_like(votes[0]), torch.zeros_like(votes[0])
    for vote, weight in zip(votes, weights, strict=True):
        kept = (vote * signs).relu()  # a sign is 1, 0 or -1, so the product is exact
        total = torch.maximum(total, kept) if aggregate == "max" else total + kept
        if aggregate == "mean":
            agrees = kept.detach().sign()
            # In place where the weight is a number: no gradient goes through the divisor then.
            divisor = divisor + agrees * weight if is_tensor(weight) else divisor.add_(agrees, alpha=weight)
    merged = signs * total
    if aggregate == "mean":  # arithmetic with signs: a tenth of the time of `torch.where`
        merged = merged / divisor.add_(1 - divisor.detach().sign().abs())
    return merged if aggregate == "max" else merged + 0.0  # no zero has a sign
