"""Weights per parameter, from the competition within each task vector and between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Method, Pass, Rows, Scope, choice, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.length import AUTO, Lengthened
from weightsmith.ops.order import Order
from weightsmith.ops.reduce import pairwise_sum, row_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pcb"]


@dataclass(frozen=True)
class Pcb(Lengthened, Method, name="pcb", needs=(BASE,)):
    """Score changes by size and agreement, and average those with the best scores.

    delta_i are n task vectors with d entries over the scope; norm(x) = (x - min) / (max - min), 0 where all are equal.
    1. a_i = |delta_i| clamped to its `clip` quantiles, entries int(d clip) and int(d (1 - clip) - 1) of the rising
       order; c_i = sign(delta_i) a_i.
    2. intra_i = exp(n norm(a_i)^2).
    3. inter_i, with n_i = sign(delta_i) norm(a_i):
       release  tanh(delta_i sum_j delta_j)       the authors' PCB_merge
       vision   tanh(delta_i sum_j n_j)           their vision scripts
       es       sum_j tanh(n_i n_j)               their evolutionary search
       paper    sum_j softmax(norm(delta_i delta_j)), as printed; no code of it was released
    4. s_i = intra_i inter_i, clamped from below to entry int(d (1 - ratio)) of its rising order; scale_i = norm(s_i).
    5. base + sum_i lambda_i c_i scale_i / sum_i scale_i; where nobody keeps an entry: base.

    A task vector whose a_i are all equal (an expert equal to the base) has no weight; the authors' code gives NaN.
    Their settings: ratio 0.2 for language and 0.05 to 0.1 for vision models, clip 0.01, vision lambda 1.2.  scope
    tensor takes all statistics tensor by tensor: fewer reads, but not the published method.
    """

    paper = "Parameter Competition Balancing (Du et al., NeurIPS 2024), arXiv:2410.02396"

    variant: str = choice("release", "how agreement is scored", "release", "es", "vision", "paper")
    ratio: float = number(0.1, "share of the entries of each task vector with a score above 0", above=0, high=1)
    clip: float = number(1e-4, "share of |delta| clamped at both ends", low=0, below=0.5)
    lambda_: Each | str = number(
        1.0, "factor of each task vector behind the scores", each=True, options=(AUTO,), smooth=True
    )
    scope_: str = choice("global", "what the order is taken over", "global", "tensor")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        scores = self._scores
        return (
            scores.sizes,
            *((scores.products, scores.partition) if self.variant == "paper" else ()),
            scores,
            *self.lengths(),
        )

    @property
    def _scores(self) -> _Scores:
        scope = Scope.MODEL if self.scope_ == "global" else Scope.TENSOR
        return _Scores(self.variant, self.ratio, self.clip, scope=scope)

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        for i, name in enumerate(names):
            if not any(found[f"pcb.spread.{i}"] for found in told.values()):
                yield f"{name} has no weight: its changes are all of one size, as those of a model equal to the base"

    def merge(self, site: Site) -> Tensor:
        deltas, scores = site.deltas, self._scores
        # [n][2] each: ends of |delta_i|, ends of s_i
        sizes, best = site.result(scores.sizes).tolist(), site.result(scores).tolist()
        for i, (low, high) in enumerate(sizes):
            site.tell(f"pcb.spread.{i}", high - low)
        # float64: scores of 90 experts span many powers of ten.
        total = merged = torch.zeros_like(deltas[0], dtype=torch.float64)
        ends = zip(sizes, best, site.spread(1.0 if self.length is not None else self.lambda_), strict=True)  # type: ignore[arg-type]
        for delta, score, (size, span, scale) in zip(deltas, scores.of_each(site), ends, strict=True):
            # Scores below the (1 - ratio) quantile become 0: these entries are dropped.
            share = _norm(score, *span)
            # Outliers among the changes are clamped, as in the authors' code.
            merged = merged + delta.sign() * delta.abs().clamp(*size) * share * scale
            total = total + share
        assert site.base is not None
        # Nobody has a score above 0: the numerator is 0 as well.
        found = (merged / total.clamp(min=1e-12)).to(deltas.dtype)
        return site.base + (found if self.length is None else self.scaled(found, site))


@dataclass(frozen=True)
class _Sizes(Order):
    """The quantiles of |delta_i| that it is clamped to."""

    clip: float

    def values(self, site: Site) -> Tensor:
        return site.deltas.abs()  # [n, *block]

    def ranks(self, total: int) -> list[int]:
        return [int(total * self.clip), int(total * (1 - self.clip) - 1)]


@dataclass(frozen=True)
class _Products(Order):
    """Least and largest delta_i delta_j of every pair: [n n, 2]."""

    def values(self, site: Site) -> Tensor:
        return torch.stack([p.float() for p in _products(site.deltas)])  # [n n, *block]

    def ranks(self, total: int) -> list[int]:
        return [0, total - 1]


@dataclass(frozen=True)
class _Partition(Pass["Tensor"]):
    """sum exp(norm(delta_i delta_j)) of every pair but for a common factor: float64 [n n]."""

    products: _Products

    def see(self, site: Site) -> State:
        # Over one tensor row by row, so that it may be cut anywhere; over the model in blocks of fixed size.
        pairs = _products(site.deltas, site.result(self.products))
        sums = torch.stack([row_sums(p.exp()) for p in pairs]).cpu()
        return {"partition": pairwise_sum(sums) if self.scope is Scope.MODEL else Rows(sums)}

    def end(self, total: Mapping[str, Any]) -> Tensor:
        sums = torch.as_tensor(total["partition"])
        sums = sums if self.scope is Scope.MODEL else pairwise_sum(sums)
        # A common factor cancels in `norm`; this one keeps the scores of large models within float32.
        return sums / sums.max().clamp(min=1)


@dataclass(frozen=True)
class _Scores(Order):
    """The s_i that count as least and as most: [n, 2]."""

    variant: str
    ratio: float
    clip: float

    @property
    def sizes(self) -> _Sizes:
        return _Sizes(self.clip, scope=self.scope)

    @property
    def products(self) -> _Products:
        return _Products(scope=self.scope)

    @property
    def partition(self) -> _Partition:
        return _Partition(self.products, scope=self.scope)

    def values(self, site: Site) -> Tensor:
        return torch.stack(list(self.of_each(site)))

    def ranks(self, total: int) -> list[int]:
        # The lower end of the scores that count, and the largest.
        return [int(total * (1 - self.ratio)), total - 1]

    def of_each(self, site: Site) -> Iterator[Tensor]:
        """s_i, [*block], rounded to float32, whose order decides."""
        deltas, ends = site.deltas, site.result(self.sizes).tolist()
        n = deltas.shape[0]
        if self.variant == "release":
            # sum_j delta_j: tanh(delta_i sum_j delta_j) is the release's inter-balancing.
            common = weighted_sum(deltas.double())
        elif self.variant == "vision":
            common = weighted_sum(torch.stack([_signed(d, *e) for d, e in zip(deltas, ends, strict=True)]))
        for i, (delta, (low, high)) in enumerate(zip(deltas, ends, strict=True)):
            if self.variant == "es":
                # Of normalised changes, pair by pair: the variant for evolution strategies.
                own = _signed(delta, low, high)
                inter = torch.zeros_like(own)
                for other, e in zip(deltas, ends, strict=True):
                    inter = inter + torch.tanh(own * _signed(other, *e))
            elif self.variant == "paper":
                inter = torch.zeros_like(delta, dtype=torch.float64)
                partition = site.result(self.partition)
                for j, product in enumerate(_products(deltas, site.result(self.products), i)):
                    # A softmax over all entries of the pair.
                    inter = inter + product.exp() / partition[i * n + j]
            else:
                inter = torch.tanh(delta.double() * common)
            # Half the largest exponent taken off: `norm` cancels the factor, and 90 experts do not overflow.
            # A softmax of n norm(|delta|)^2 but for its sum, which `norm` cancels.
            intra = torch.exp(n * _norm(delta.abs().double().clamp(low, high), low, high).square() - n / 2)
            # An expert whose changes are all of one size has no score.
            yield (intra * inter * (high > low)).float()


def _norm(values: Tensor, low: float, high: float) -> Tensor:
    """(x - low) / (high - low) of values clamped to the range, float64; 0 where the range is empty."""
    inside = values.double().clamp(low, high)
    return (inside - low) / (high - low) if high > low else torch.zeros_like(inside)


def _signed(delta: Tensor, low: float, high: float) -> Tensor:
    return delta.sign() * _norm(delta.abs(), low, high)


def _products(deltas: Tensor, ends: np.ndarray | None = None, only: int | None = None) -> Iterator[Tensor]:
    """delta_i delta_j of all pairs (of one i), float64; with their ends, norm of them."""
    n = deltas.shape[0]
    for i in range(n) if only is None else (only,):
        for j in range(n):
            product = deltas[i].double() * deltas[j]
            yield product if ends is None else _norm(product, *ends[i * n + j].tolist())
