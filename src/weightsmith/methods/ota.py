"""Mean of models weighted by the curvature that Adam has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.method import Each, Method, Pass, choice, number
from weightsmith.core.pass_ import Rows, State
from weightsmith.core.site import Site
from weightsmith.ops.combine import mean, some_weight, spread, weighted_sum
from weightsmith.ops.moments import curvature, powered
from weightsmith.ops.reduce import pairwise_sum, row_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ota"]


@dataclass(frozen=True)
class Ota(Method, name="ota", needs=("second_moment",), checks=(some_weight,)):
    """Average every weight by the second moments of Adam, each model's preconditioner.

    a_i = s_i v_i^p + eps, with v_i the second moment (statistic "second_moment", >= 0, shaped like the weights);
    result: sum_i a_i x_i / sum_i a_i, which is base + sum_i a_i delta_i / sum_i a_i.

    Behind a filter (`ffg | ota`), entries that it dropped have no weight: a_i = 0 where delta_i = 0.  Where all are
    dropped the result is the base, or with `fallback: mean` the plain mean of the models.

    power 0.5 is Adam's preconditioner, power 1 with v = F is Fisher merging.  Second moments of language models are
    1e-20 to 1e-14, so that an absolute epsilon of 1e-8 (the authors' code) makes all weights equal; the default is
    relative to the mean of v^p over the tensor and all models, which no common factor of the moments changes.
    """

    paper = "Harnessing Optimization Dynamics for Curvature-Informed Model Merging (2025), arXiv:2509.11167"

    weight: Each = number(1.0, "factor of each model's curvature", low=0, each=True, smooth=True)
    power: float = number(0.5, "exponent of the second moment", above=0)
    epsilon: float = number(1e-6, "least weight of an entry", low=0)
    epsilon_mode: str = choice(
        "relative", "what epsilon is a share of: the tensor's mean, or 1", "relative", "absolute"
    )
    normalize: str = choice("none", "what each model's curvature is divided by", "none", "mean")
    fallback: str = choice("base", "value where a filter left no model anything", "base", "mean")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        asked = self.normalize == "mean" or self.epsilon_mode == "relative"
        return (_Means(self.power),) if asked else ()

    def merge(self, site: Site) -> Tensor:
        shares = self._weights(site)
        if site.origin is not None:  # behind a filter
            shares = [torch.where(delta == 0, 0.0, a) for a, delta in zip(shares, site.deltas, strict=True)]
        total = weighted_sum(shares)
        left = total > 0
        # Divided first: products of tiny moments and tiny weights would vanish.
        shares = [torch.where(left, a / total, 0.0) for a in shares]
        if site.base is None:
            return torch.where(left, weighted_sum(site.experts, shares), mean(site.experts))
        merged = site.base + weighted_sum(site.deltas, shares)
        if self.fallback == "base" and site.origin is not None:
            return merged
        return torch.where(left, merged, mean((site.origin or site).experts))

    def _weights(self, site: Site) -> list[Tensor]:
        """s_i v_i^p [/ mean] + eps of every model."""
        means = site.result(_Means(self.power)) if self.passes(site.count) else [1.0] * site.count
        scales = list(spread(self.weight, site.count))
        least = self.epsilon
        if self.normalize == "mean":
            scales = [s / m if m > 0 else 0.0 for s, m in zip(scales, means, strict=True)]
        if self.epsilon_mode == "relative":
            least *= sum(s * m for s, m in zip(scales, means, strict=True)) / site.count
        # Equal factors of all weights cancel: the greatest is brought to about 1, away from float32's least numbers.
        top = max((s * m for s, m in zip(scales, means, strict=True)), default=0.0)
        unit = top if top > 0 else 1.0
        return [powered(v, self.power) * (s / unit) + least / unit for v, s in zip(_moments(site), scales, strict=True)]


@dataclass(frozen=True)
class _Means(Pass[list[float]]):
    """The mean of each model's v^power over the tensor."""

    power: float

    def see(self, site: Site) -> State:
        sums = [row_sums(powered(v.double(), self.power)) for v in _moments(site)]
        return {"sums": Rows(torch.stack(sums).cpu()), "count": torch.tensor(site.stack[0].numel())}

    def end(self, total: Mapping[str, Any]) -> list[float]:
        found: list[float] = (pairwise_sum(torch.as_tensor(total["sums"])) / max(int(total["count"]), 1)).tolist()
        return found


def _moments(site: Site) -> tuple[Tensor, ...]:
    return curvature(site, "second_moment")
