"""Spectral WUDI that finds the number of directions by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import dims
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Whole, choice, integer, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.interference import STARTS, flowed
from weightsmith.ops.length import Scaled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RULES", "Aswudi", "count_directions"]

RULES = ("participation_sqrt", "participation", "entropy", "stable_rank", "gavish_donoho", "cumulative", "none")


@dataclass(frozen=True)
class Aswudi(Whole, Scaled, name="aswudi", needs=(BASE,), checks=(dims(2),), otherwise=scaled_mean, apart=True):
    """Run `swudi` to its end, in as many directions per matrix as the spectrum suggests.

    By `rule`, for the eigenvalues l (falling, y = sqrt(l)) of C, see `swudi`:

    participation_sqrt  ceil((sum y)^2 / sum y^2); the authors' choice for CLIP and adapters
    gavish_donoho       how many y exceed omega median(y); the authors' choice for language models
    participation       ceil((sum l)^2 / sum l^2)
    entropy             ceil(exp(-sum p log p)), p = l / sum l
    stable_rank         ceil(sum l^2 / l_1^2)
    cumulative          the first count whose share of sum l reaches `share`
    none                all

    Result: base + scaling M; tensors that are not matrices get base + scaling mean(tau).
    """

    paper = "OptMerge (Wei et al., ICLR 2026), arXiv:2505.19892: adaptive spectral WUDI in its authors' code"

    rule: str = choice("participation_sqrt", "how directions are counted", *RULES)
    share: float = number(0.95, "share of the spectrum, for rule cumulative", above=0, high=1)
    min_rank: int = integer(1, "least number of directions", low=1)
    time: float | str = number("inf", "time of the gradient flow", low=0, options=("inf",))
    init: str = choice("sum", "where M starts", *STARTS)
    min_eigenvalue: float = number(1e-8, "eigenvalues below this count as this", above=0)
    scaling: float = number(1.0, "factor of the merged task vector", smooth=True)

    def merged(self, site: Site) -> Tensor:
        aspect = min(site.block_shape) / max(site.block_shape)

        # `values`: all n eigenvalues of C, falling and floored at min_eigenvalue, so that no logarithm or quotient
        # fails.
        def count(values: Tensor) -> int:
            found = min(count_directions(values, self.rule, aspect, self.share), len(values))
            return max(found, self.min_rank)

        return flowed(site.deltas, self.init, float(self.time), self.min_eigenvalue, count)


def count_directions(values: Tensor, rule: str, aspect: float, share: float = 1.0) -> int:
    """How many of the eigenvalues, falling and positive, a rule takes; `aspect`: shorter side / longer side."""
    if rule == "none":
        return len(values)
    if rule == "cumulative":
        # The first count whose share is reached is one more than those that do not reach it.
        return int((values.cumsum(0) / values.sum() < share).sum()) + 1
    if rule == "gavish_donoho":
        roots = values.sqrt()
        return max(1, int((roots > _omega(aspect) * roots.median()).sum()))
    if rule == "entropy":
        # exp of the entropy: as many directions as equal ones of the same entropy.
        p = values / values.sum()
        return math.ceil(torch.exp(-(p * p.log()).sum()))
    if rule == "stable_rank":
        return math.ceil(values.square().sum() / values[0].square())
    # (sum w)^2 / sum w^2 is n for n equal weights and 1 for a single one.
    weights = values.sqrt() if rule == "participation_sqrt" else values
    return math.ceil(weights.sum().square() / weights.square().sum())


def _omega(aspect: float) -> float:
    """Gavish and Donoho's factor of the median singular value, with the authors' stand-in for the median of noise.

    arXiv:1305.5870 has lambda(beta) / sqrt(median of the Marchenko-Pastur law); OptMerge's code takes
    (1 - beta)^2 + beta for that median, and 2 + sqrt(3) for square matrices.
    """
    b = aspect
    # lambda(beta)^2 of arXiv:1305.5870.
    optimal = 2 * (b + 1) + 8 * b / ((b + 1) + math.sqrt(b * b + 14 * b + 1))
    middle = (1 - b) ** 2 + b if b < 0.9999 else 2 + math.sqrt(3)
    return math.sqrt(optimal / middle)
