"""Trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightsmith.core.kernel import TrimmedVote
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Method, Rows, Scope, choice, number
from weightsmith.core.site import Site, Summary
from weightsmith.ops import select
from weightsmith.ops.combine import AGGREGATES, SIGN_RULES, disjoint, elect_sign, spread, weigh
from weightsmith.ops.reduce import block_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ties"]


@dataclass(frozen=True)
class Ties(
    Method,
    name="ties",
    needs=(BASE,),
    paper="TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708",
    symmetric=True,
    scratch=2.5,
    matrix=2.1,
    histograms=2,
    cost=7.0,
):
    """Trim small changes, elect one sign per weight, average the changes that agree with it.

    1. Trim each task vector to its largest |delta|.  scope global (the authors' code): every entry at or above
       the (int(d density) + 1)-th largest of all d entries of the model; scope tensor (mergekit): exactly
       max(1, int(density numel)) per tensor, equals by lower index.  density 1 keeps everything.
    2. v_i = w_i delta_i; elect the sign of sum_i v_i (`mass`), or as in `ops.combine.elect_sign`.  Where the
       vote is exactly 0, `zero_sign` decides: the sign of the sum of all elected signs over the scope, its
       opposite, or plus (mergekit).  A tied majority counts as plus.
    3. Among the v_i of the elected sign: mean (sum v_i / sum w_i), sum, or max.  Result: base + lambda merged.

    mergekit's `ties` is scope tensor, zero_sign plus, with aggregate mean for its `normalize: true`, sum for
    false.  Weights other than 1 do not occur in the paper.  Norms of normfrac and normmass are those of the
    trimmed task vectors over the scope (not verified against the authors' numbers); a norm of 0 has no voice.
    """

    density: Each = number(0.2, "share of each task vector kept", above=0, high=1, each=True)
    weight: Each = number(1.0, "factor of each task vector, before the vote", each=True)
    lambda_: float = number(1.0, "factor of the merged task vector")
    scope_: str = choice("global", "what the largest are counted over", "global", "tensor")
    sign: str = choice("mass", "how signs are elected", *SIGN_RULES)
    zero_sign: str = choice("majority", "sign where the vote is tied", "majority", "minority", "plus")
    aggregate: str = choice("mean", "how agreeing changes are combined", *AGGREGATES)

    def check(self, count: int, has_base: bool) -> str | None:
        weights = spread(self.weight, count)
        if self.aggregate != "mean" or min(weights) >= 0:
            return None
        return (
            f"weight {min(weights):g} (model {weights.index(min(weights)) + 1} of {count}) loses its sign where "
            "aggregate mean divides by the weights that agree; set aggregate: sum (mergekit: normalize: false)"
        )

    @property
    def passes(self) -> tuple[str, ...]:
        """What each measuring round finds out."""
        trim = () if self._untrimmed else ("high", "low") if self.scope is Scope.MODEL else ("high", "low", "ties")
        norms = ("norms",) if self.sign.startswith("norm") else ()
        return trim + norms + (() if self.zero_sign == "plus" else ("signs",))

    @property
    def _untrimmed(self) -> bool:
        return all(d == 1 for d in (self.density if isinstance(self.density, tuple) else (self.density,)))

    @property
    def rounds(self) -> int:
        return len(self.passes)

    @property
    def scope(self) -> Scope:
        return Scope.MODEL if self.scope_ == "global" else Scope.TENSOR

    def question(self, round: int) -> Any:
        step = self.passes[round]
        if step == "high":
            return type(self), step  # all magnitudes are counted, whatever is kept of them
        return replace(self, lambda_=1.0, aggregate="mean"), step

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        first = next(iter(told.values()))
        for i, (name, density) in enumerate(zip(names, spread(self.density, len(names)), strict=True)):
            if (changed := first.get(f"ties.changed.{i}")) is not None:
                yield f"density = {density:g} trims nothing of {name}: of its changes only {changed:.2%} are not 0"

    def skips(self, key: Key, round: int, summary: Summary) -> bool:
        return self.passes[round] == "ties" and select.settled(summary)

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        step = self.passes[round]
        if step == "norms":
            squares = [block_squares(d) for d in self._trimmed(site)]
            return {"ties.squares": torch.stack(squares).cpu()}
        if step == "signs":
            return {"ties.signs": self._elected(site, self._votes(site)).to(torch.int64).sum().cpu()}
        return select.measure(site.deltas, site.summary, round)

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Any]:
        if self.passes[round] in ("norms", "signs"):
            return {**summary, **totals}
        found = select.digest(totals, round, summary, self.cuts, whole=self.scope is Scope.MODEL)
        if self.passes[round] == "low":
            found["told"] = {f"ties.changed.{i}": share for i, share in select.untrimmed(found).items()}
        return found

    def fused(self, count: int) -> TrimmedVote | None:
        if self.sign != "mass" or self.aggregate == "max":
            return None
        return TrimmedVote(
            weights=spread(self.weight, count),
            scale=float(self.lambda_),
            trim=not self._untrimmed,
            steps=self.passes,
            zero=self.zero_sign,
            mean=self.aggregate == "mean",
        )

    def merge(self, site: Site) -> Tensor:
        votes = self._votes(site)
        signs = self._elected(site, votes)
        signs = torch.where(signs == 0, self._sign_of_zero(site.summary), signs)
        merged = disjoint(votes, signs, site.spread(self.weight), self.aggregate)
        assert site.base is not None
        return site.base + merged * self.lambda_

    def cuts(self, count: int, total: int) -> list[list[int]]:
        densities = spread(self.density, count)
        if self.scope is Scope.MODEL:
            return [[total if d == 1 else min(int(total * d) + 1, total)] for d in densities]
        return [[select.keep_share(total, d)] for d in densities]

    def _trimmed(self, site: Site) -> Tensor:
        deltas = site.deltas
        if self._untrimmed:
            return deltas
        (kept,) = select.before(deltas, site.summary, site.start)
        return torch.where(kept, deltas, 0.0)

    def _votes(self, site: Site) -> Tensor:
        return weigh(self._trimmed(site), site.spread(self.weight))

    def _elected(self, site: Site, votes: Tensor) -> Tensor:
        norms: Sequence[float] | None = None
        if "ties.squares" in site.summary:
            norms = site.summary["ties.squares"].sqrt().tolist()
        return elect_sign(votes.detach(), self.sign, norms)

    def _sign_of_zero(self, summary: Summary) -> float:
        if self.zero_sign == "plus" or int(summary["ties.signs"]) == 0:
            return 1.0
        majority = 1.0 if int(summary["ties.signs"]) > 0 else -1.0
        return majority if self.zero_sign == "majority" else -majority
