"""Keep the largest changes that agree with the elected sign, model by model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightsmith.core.kernel import Elected, Vote, sign_of_zero
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Filter, Pass, Scope, choice, number
from weightsmith.core.site import Site
from weightsmith.methods.ties import Balance, Ballot, Ties

__all__ = ["Agree"]


@dataclass(frozen=True)
class Agree(Filter, name="agree", needs=(BASE,)):
    """Trim every task vector as `ties` does, and drop the changes against the elected sign.

    The task vectors stay apart, unscaled and unmerged, so that each may get a coefficient of its own: AdaMerging++ is
    `agree` before `task_arithmetic` with learned weights.  Kept are the changes that trimming keeps and whose sign is
    that of the sum of the trimmed task vectors; where that sum is 0, the sign of the sum of all elected signs over the
    scope.
    """

    paper = "AdaMerging++ (Yang et al., ICLR 2024), arXiv:2310.02575, its first two steps"

    density: Each = number(0.2, "share of each task vector kept", above=0, high=1, each=True)
    scope_: str = choice("global", "what the largest are counted over", "global", "tensor")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        ballot, balance = self._asked(count)
        return (balance,) if ballot.cut is None else (ballot.cut, balance)

    def fused(self, count: int) -> Elected:
        ballot, balance = self._asked(count)
        return Elected(Vote(ballot.weights, 1.0, ballot.cut, balance, "majority", mean=False))

    def apply(self, site: Site) -> Site:
        ballot, balance = self._asked(site.count)
        votes = ballot.trimmed(site)
        signs = ballot.elected(site, votes)
        signs = torch.where(signs == 0, sign_of_zero("majority", site.result(balance)), signs)
        return site.with_deltas(torch.where(votes.detach().sign() == signs, votes, 0.0))

    def _asked(self, count: int) -> tuple[Ballot, Balance]:
        ballot = Ties(density=self.density, scope_=self.scope_).ballot(count)
        return ballot, Balance(ballot, scope=Scope.MODEL if self.scope_ == "global" else Scope.TENSOR)
