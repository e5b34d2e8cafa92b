"""Weights per parameter, from the competition within each task vector and between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Method, Rows, Scope, choice, number
from weightsmith.core.site import Site, Summary
from weightsmith.ops import order
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pcb"]


@dataclass(frozen=True)
class Pcb(
    Method,
    name="pcb",
    needs=(BASE,),
    paper="Parameter Competition Balancing (Du et al., NeurIPS 2024), arXiv:2410.02396",
    symmetric=True,
    keeps_expert=False,
    scratch=12.0,
    histograms=2,
    cost=77.0,
):
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

    variant: str = choice("release", "how agreement is scored", "release", "es", "vision", "paper")
    ratio: float = number(0.1, "share of the entries of each task vector with a score above 0", above=0, high=1)
    clip: float = number(1e-4, "share of |delta| clamped at both ends", low=0, below=0.5)
    lambda_: Each = number(1.0, "factor of each task vector behind the scores", each=True)
    scope_: str = choice("global", "what the order is taken over", "global", "tensor")

    @property
    def passes(self) -> tuple[str, ...]:
        """What each measuring round looks at."""
        paper = ("product", "product", "partition") if self.variant == "paper" else ()
        return ("size", "size", *paper, "score", "score")

    @property
    def rounds(self) -> int:
        return len(self.passes)

    @property
    def scope(self) -> Scope:
        return Scope.MODEL if self.scope_ == "global" else Scope.TENSOR

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        step, deltas, known = self.passes[round], site.deltas, site.summary
        if step == "partition":
            # Over one tensor row by row, so that it may be cut anywhere; over the model in blocks of fixed size.
            sums = torch.stack([row_sums(p.exp()) for p in _products(deltas, known)]).cpu()
            return {"pcb.partition": pairwise_sum(sums) if self.scope is Scope.MODEL else Rows(sums)}
        if step == "size":
            seen = deltas.abs()
        elif step == "product":
            seen = torch.stack([p.float() for p in _products(deltas)])
        else:
            seen = torch.stack(list(self._scores(deltas, known)))
        return order.measure(seen, known, self._turn(round))

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Any]:
        step = self.passes[round]
        if step == "partition":
            sums = torch.as_tensor(totals["pcb.partition"])
            sums = sums if self.scope is Scope.MODEL else pairwise_sum(sums)
            # A common factor cancels in `norm`; this one keeps the scores of large models within float32.
            return {**summary, "pcb.partition": sums / sums.max().clamp(min=1)}
        found = order.digest(totals, self._turn(round), summary, getattr(self, f"_{step}_ranks"))
        if "order.values" in found:
            found[f"pcb.{step}"] = found.pop("order.values")
        return found

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        for i, name in enumerate(names):
            if not any(found[f"pcb.spread.{i}"] for found in told.values()):
                yield f"{name} has no weight: its changes are all of one size, as those of a model equal to the base"

    def merge(self, site: Site) -> Tensor:
        deltas, known = site.deltas, site.summary
        for i, (low, high) in enumerate(known["pcb.size"].tolist()):
            site.tell(f"pcb.spread.{i}", high - low)
        total = merged = torch.zeros_like(deltas[0], dtype=torch.float64)
        ends = zip(known["pcb.size"].tolist(), known["pcb.score"].tolist(), site.spread(self.lambda_), strict=True)
        for delta, score, (sizes, scores, scale) in zip(deltas, self._scores(deltas, known), ends, strict=True):
            share = _norm(score, *scores)
            merged = merged + delta.sign() * delta.abs().clamp(*sizes) * share * scale
            total = total + share
        assert site.base is not None
        return site.base + (merged / total.clamp(min=1e-12)).to(deltas.dtype)

    def _turn(self, round: int) -> int:
        """0 for the first of two rounds on the same thing, 1 for the second."""
        return int(self.passes[round - 1] == self.passes[round]) if round else 0

    def _size_ranks(self, total: int) -> list[int]:
        return [int(total * self.clip), int(total * (1 - self.clip) - 1)]

    def _product_ranks(self, total: int) -> list[int]:
        return [0, total - 1]

    def _score_ranks(self, total: int) -> list[int]:
        return [int(total * (1 - self.ratio)), total - 1]

    def _scores(self, deltas: Tensor, known: Summary) -> Iterator[Tensor]:
        """s_i, rounded to float32, whose order decides."""
        n, ends = deltas.shape[0], known["pcb.size"].tolist()
        if self.variant == "release":
            common = weighted_sum(deltas.double())
        elif self.variant == "vision":
            common = weighted_sum(torch.stack([_signed(d, *e) for d, e in zip(deltas, ends, strict=True)]))
        for i, (delta, (low, high)) in enumerate(zip(deltas, ends, strict=True)):
            if self.variant == "es":
                own = _signed(delta, low, high)
                inter = torch.zeros_like(own)
                for other, e in zip(deltas, ends, strict=True):
                    inter = inter + torch.tanh(own * _signed(other, *e))
            elif self.variant == "paper":
                inter = torch.zeros_like(delta, dtype=torch.float64)
                for j, product in enumerate(_products(deltas, known, i)):
                    inter = inter + product.exp() / known["pcb.partition"][i * n + j]
            else:
                inter = torch.tanh(delta.double() * common)
            # Half the largest exponent taken off: `norm` cancels the factor, and 90 experts do not overflow.
            intra = torch.exp(n * _norm(delta.abs().double().clamp(low, high), low, high).square() - n / 2)
            yield (intra * inter * (high > low)).float()


def _norm(values: Tensor, low: float, high: float) -> Tensor:
    """(x - low) / (high - low) of values clamped to the range, float64; 0 where the range is empty."""
    inside = values.double().clamp(low, high)
    return (inside - low) / (high - low) if high > low else torch.zeros_like(inside)


def _signed(delta: Tensor, low: float, high: float) -> Tensor:
    return delta.sign() * _norm(delta.abs(), low, high)


def _products(deltas: Tensor, known: Summary | None = None, only: int | None = None) -> Iterator[Tensor]:
    """delta_i delta_j of all pairs (of one i), float64; with a summary, norm of them."""
    n = deltas.shape[0]
    for i in range(n) if only is None else (only,):
        for j in range(n):
            product = deltas[i].double() * deltas[j]
            yield product if known is None else _norm(product, *known["pcb.product"][i * n + j].tolist())
