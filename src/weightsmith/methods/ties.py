"""Trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core import kernel
from weightsmith.core.checks import Case, Verdict, remark
from weightsmith.core.kernel import Vote, sign_of_zero
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Method, Pass, Scope, choice, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import AGGREGATES, SIGN_RULES, disjoint, elect_sign, spread, weigh
from weightsmith.ops.length import AUTO, Lengthened
from weightsmith.ops.reduce import block_squares
from weightsmith.ops.select import Largest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Balance", "Ballot", "Ties"]


@dataclass(frozen=True)
class Ties(Lengthened, Method, name="ties", needs=(BASE,)):
    """Trim small changes, elect one sign per weight, average the changes that agree with it.

    1. Trim each task vector to its largest |delta|.  scope global (the authors' code): every entry at or above
       the (int(d density) + 1)-th largest of all d entries of the model; scope tensor (mergekit): exactly
       max(1, int(density numel)) per tensor, equals by lower index.  density 1 keeps everything.
    2. v_i = w_i delta_i; elect the sign of sum_i v_i (`mass`), or as in `ops.combine.elect_sign`.  Where the
       vote is exactly 0, `zero_sign` decides: the sign of the sum of all elected signs over the scope, its
       opposite, or plus (mergekit).  A tied majority counts as plus.
    3. Among the v_i of the elected sign: mean (sum v_i / sum w_i), sum, or max.  Result: base + lambda merged.

    mergekit's `ties` is scope tensor, zero_sign plus, with aggregate mean for its `normalize: true`, sum for
    false.  Weights other than 1 do not occur in the paper; negative ones keep their sign in the divisor, as in
    mergekit.  Norms of normfrac and normmass are those of the trimmed task vectors over the scope (not verified
    against the authors' numbers); a norm of 0 has no voice.
    """

    paper = "TIES-Merging (Yadav et al., NeurIPS 2023), arXiv:2306.01708"

    density: Each = number(0.2, "share of each task vector kept", above=0, high=1, each=True)
    weight: Each = number(1.0, "factor of each task vector, before the vote", each=True, smooth=True)
    lambda_: float | str = number(1.0, "factor of the merged task vector", options=(AUTO,), smooth=True)
    scope_: str = choice("global", "what the largest are counted over", "global", "tensor")
    sign: str = choice("mass", "how signs are elected", *SIGN_RULES)
    zero_sign: str = choice("majority", "sign where the vote is tied", "majority", "minority", "plus")
    aggregate: str = choice("mean", "how agreeing changes are combined", *AGGREGATES)

    def check(self, case: Case) -> Iterable[Verdict]:
        weights = spread(self.weight, case.count)
        if self.aggregate != "mean" or min(weights) >= 0:
            return ()
        return remark(
            f"weight {min(weights):g} (model {weights.index(min(weights)) + 1} of {case.count}): with aggregate mean "
            "the divisor is the sum of the weights that agree, as in mergekit: where only this one does, its change "
            "counts with its sign turned back, and where the sum is near 0 the change grows; aggregate: sum (mergekit: "
            "normalize: false) divides by nothing"
        )

    @property
    def scope(self) -> Scope:
        """What is counted over."""
        # The authors trim the flattened model, mergekit each tensor.
        return Scope.MODEL if self.scope_ == "global" else Scope.TENSOR

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        ballot = self.ballot(count)
        # In this order: norms are those of trimmed task vectors, signs those of what they elect.
        found = tuple(one for one in (ballot.cut, ballot.norms, self._signs(count)) if one is not None)
        return (*found, *self.lengths())

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        # A cut over the model is told alike for all its tensors.
        first = next(iter(told.values()))
        for i, (name, density) in enumerate(zip(names, spread(self.density, len(names)), strict=True)):
            if (changed := first.get(f"cut.changed.{i}")) is not None:
                yield f"density = {density:g} trims nothing of {name}: of its changes only {changed:.2%} are not 0"

    def fused(self, count: int) -> Vote | None:
        # The kernel elects by mass and adds; the rest is torch's.
        if self.sign != "mass" or self.aggregate == "max":
            return None
        weights, cut = spread(self.weight, count), self.ballot(count).cut
        scale = 1.0 if self.length is not None else float(self.lambda_)
        mean = self.aggregate == "mean"
        return Vote(weights, scale, cut, self._signs(count), self.zero_sign, mean, self.length)

    def merge(self, site: Site) -> Tensor:
        ballot, balance = self.ballot(site.count), self._signs(site.count)
        votes = ballot.votes(site)  # w_i trimmed delta_i: [n, *block]
        signs = ballot.elected(site, votes)  # -1, 0, 1: [*block]
        # 0 only where no vote is needed: zero_sign plus has no pass.
        tied = sign_of_zero(self.zero_sign, 0 if balance is None else site.result(balance))
        signs = torch.where(signs == 0, tied, signs)
        merged = disjoint(votes, signs, site.spread(self.weight), self.aggregate)
        assert site.base is not None
        return site.base + self.scaled(merged, site)

    def ballot(self, count: int) -> Ballot:
        """What the passes and the vote have in common."""
        densities = spread(self.density, count)
        whole = self.scope is Scope.MODEL
        # Nothing to trim: no look at the model for a cut.
        cut = None if set(densities) == {1} else Largest(whole, densities, scope=self.scope)
        return Ballot(cut, spread(self.weight, count), self.sign, self.scope)

    def _signs(self, count: int) -> Balance | None:
        return None if self.zero_sign == "plus" else Balance(self.ballot(count), scope=self.scope)


@dataclass(frozen=True)
class Ballot:
    """Who votes how: what trimming, weights and the sign rule say, before anything is combined."""

    cut: Largest | None
    weights: tuple[float, ...]
    rule: str
    scope: Scope

    @property
    def norms(self) -> _Norms | None:
        """The pass that two of the sign rules need."""
        return _Norms(self, scope=self.scope) if self.rule.startswith("norm") else None

    def trimmed(self, site: Site) -> Tensor:
        """The task vectors, [n, *block], zero where they are not among the largest."""
        deltas = site.deltas
        if self.cut is None:
            return deltas
        # bool [n, *block]
        (kept,) = site.result(self.cut).before(deltas, site.start)
        return torch.where(kept, deltas, 0.0)

    def votes(self, site: Site) -> Tensor:
        return weigh(self.trimmed(site), self.weights)

    def elected(self, site: Site, votes: Tensor) -> Tensor:
        """-1, 0 or 1 per entry: [*block]."""
        # A vote has no derivative: signs are constants to gradients.
        norms = None if self.norms is None else site.result(self.norms)
        return elect_sign(votes.detach(), self.rule, norms)


@dataclass(frozen=True)
class _Norms(Pass[list[float]]):
    """The L2 norms of the trimmed task vectors."""

    slope: ClassVar[str] = "flat"

    ballot: Ballot

    def see(self, site: Site) -> State:
        return {"squares": torch.stack([block_squares(d) for d in self.ballot.trimmed(site)]).cpu()}  # float64 [n]

    def end(self, total: Mapping[str, Any]) -> list[float]:
        found: list[float] = total["squares"].sqrt().tolist()
        return found


@dataclass(frozen=True)
class Balance(Pass[int]):
    """The sum of all elected signs."""

    slope: ClassVar[str] = "flat"

    ballot: Ballot

    def see(self, site: Site) -> State:
        # An integer: the sum over the model is exact in any order.
        return {"signs": self.ballot.elected(site, self.ballot.votes(site)).to(torch.int64).sum().cpu()}

    def end(self, total: Mapping[str, Any]) -> int:
        return int(total["signs"])

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Balance()
