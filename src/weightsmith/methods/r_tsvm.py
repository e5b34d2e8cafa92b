"""tsvm with weights from outliers and ranks from sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import Case, Verdict, dims, leave
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Whole, choice, integer, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.methods.tsvm import FEW
from weightsmith.ops.length import AUTO, Scaled
from weightsmith.ops.reduce import block_sums, row_sums
from weightsmith.ops.spectral import orthogonal_sum, svd_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RTsvm"]

DESTROYED = 0.9
"""Share of zeros above which a task vector is hardly there."""


@dataclass(frozen=True)
class RTsvm(
    Whole, Scaled, name="r_tsvm", needs=(BASE,), streams=2, checks=(dims(2),), otherwise=scaled_mean, apart=True
):
    """Merge as `tsvm` does, with a weight per task from its outliers and a rank from its sparsity.

    Meant for task vectors with heavy tails.
    The paper gives the ingredients but no formulae; those here are a reconstruction.  Per matrix with task vectors
    tau_t (m x n), p = min(m, n), T tasks with tau_t != 0 (others are dropped):

    1. o_t = share of sum |tau_t| in entries above mean + outlier_sigma std of |tau_t| in their row.
    2. preserve: w_t = T o_t / sum o; suppress: w_t = T (1 - o_t) / sum (1 - o); none, or no outliers: w_t = 1.
       `weight_cap` 4 keeps one task from outweighing the others by more than that.
    3. z_t = share of entries with |tau_t| <= sparsity_eps max |tau_t|.
    4. k_t = max(rank_min, floor(p rank_base (1 - rank_gamma z_t))), scaled down together to sum k_t <= p.
    5. tsvm of the w_t tau_t with ranks k_t.

    With weighting none and rank_gamma 0 this is tsvm.  Tensors that are no matrices, and matrices with p < T
    rank_min, get the plain mean.
    """

    paper = "R-TSVM of Mix Data or Merge Models? (2025), arXiv:2502.06876; our reconstruction, no code was published"

    scaling: float | str = number(1.0, "factor of the merged task vector", options=(AUTO,), smooth=True)
    outlier_sigma: float = number(3.0, "standard deviations above the mean that make an outlier", above=0)
    weighting: str = choice(
        "preserve", "tasks of many outliers get more or less weight", "preserve", "suppress", "none"
    )
    sparsity_eps: float = number(1e-5, "entries up to this share of the largest count as zero", low=0)
    rank_base: float | str = number(
        "auto", "share of triplets kept without zeros; auto: 1 / models", above=0, high=1, options=("auto",)
    )
    rank_gamma: float = number(1.0, "how far zeros lower the rank", low=0, high=1)
    rank_min: int = integer(1, "least rank of a task", low=1)
    weight_cap: float | str = number(
        "none", "weights are held between 1 / weight_cap and weight_cap", low=1, options=("none",)
    )

    def check(self, case: Case) -> Iterable[Verdict]:
        # Every task is to keep at least rank_min directions.
        few = case.key is not None and min(case.key.shape) < case.count * self.rank_min
        return leave(FEW if few else None)

    def merged(self, site: Site) -> Tensor:
        assert site.base is not None
        size = min(site.block_shape)
        # First walk: two numbers per task.  An expert equal to the base has neither.
        seen = [(outlier_share(d, self.outlier_sigma), zero_share(d, self.sparsity_eps)) if bool(d.any()) else None
                for d in map(torch.Tensor.detach, site.tasks)]  # fmt: skip
        # It takes no rank from the others.
        alive = [shares for shares in seen if shares is not None]
        if not alive:
            return torch.zeros_like(site.base)
        # With and without the cap, to be able to say that it held something back.
        found, free = (self._weights([outliers for outliers, _ in alive], cap) for cap in (self._cap, math.inf))
        site.tell("r_tsvm.capped", float(found != free))
        for i, shares in enumerate(seen):
            site.tell(f"r_tsvm.zeros.{i}", 1.0 if shares is None else shares[1])
        weights = iter(found)
        ranks = iter(self._ranks(size, site.count, [zeros for _, zeros in alive]))
        parts = [
            # Second walk: one task vector at a time; the weight goes into the singular values.
            svd_of(delta * next(weights), next(ranks))
            for delta, shares in zip(site.tasks, seen, strict=True)
            if shares is not None
        ]
        return orthogonal_sum(parts, dtype=site.base.dtype).to(site.base.dtype)

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        told = {tensor: found for tensor, found in told.items() if "r_tsvm.capped" in found}
        for i, name in enumerate(names if told else ()):
            least = min(found[f"r_tsvm.zeros.{i}"] for found in told.values())
            if least > DESTROYED:
                yield (
                    f"at least {least:.1%} of the changes of {name} are zero in every matrix: too small for the "
                    "precision that it is stored in?"
                )
        if capped := sum(found["r_tsvm.capped"] for found in told.values()):
            yield f"weight_cap = {self.weight_cap} held weights back in {capped:.0f} of {len(told)} matrices"

    @property
    def _cap(self) -> float:
        return math.inf if isinstance(self.weight_cap, str) else self.weight_cap

    def _weights(self, outliers: list[float], cap: float | None = None) -> list[float]:
        shares = [1 - o for o in outliers] if self.weighting == "suppress" else outliers
        if self.weighting == "none" or sum(outliers) == 0 or sum(shares) == 0:
            return [1.0] * len(outliers)
        # Mean 1: the sum of the task vectors keeps its size.
        weights = [len(shares) * share / sum(shares) for share in shares]
        cap = self._cap if cap is None else cap
        return [min(max(weight, 1 / cap), cap) for weight in weights]

    def _ranks(self, size: int, count: int, zeros: list[float]) -> list[int]:
        full = size / count if isinstance(self.rank_base, str) else size * self.rank_base
        ranks = [max(self.rank_min, int(full * (1 - self.rank_gamma * z) + 1e-9)) for z in zeros]
        if sum(ranks) > size:
            # In proportion, where they do not fit beside each other.
            ranks = [max(self.rank_min, k * size // sum(ranks)) for k in ranks]
        while sum(ranks) > size:  # the floors took more than their share
            top = max(ranks)
            ranks = [k - 1 if k == top else k for k in ranks]
        return ranks


def outlier_share(delta: Tensor, sigma: float) -> float:
    """The share of sum |delta| in entries above mean + sigma std (of the population) of |delta| in their row."""
    # Per row, that is per output: rows differ in scale.
    size = delta.abs().double()
    mean = row_sums(size) / size.shape[1]
    std = (row_sums((size - mean[:, None]).square()) / size.shape[1]).sqrt()
    above = size > (mean + sigma * std)[:, None]
    return float(block_sums(torch.where(above, size, 0.0)) / block_sums(size))


def zero_share(delta: Tensor, eps: float) -> float:
    """The share of entries with |delta| <= eps max |delta|."""
    size = delta.abs()
    return int((size <= eps * size.max()).sum()) / size.numel()
