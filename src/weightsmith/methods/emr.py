"""One task vector that every task can be cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.method import BASE, Method, Pass, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import disjoint, elect_sign
from weightsmith.ops.length import AUTO, Lengthened

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Emr"]


@dataclass(frozen=True)
class Emr(Lengthened, Method, name="emr", needs=(BASE,)):
    """Take the largest change of the elected sign, entry by entry.

    Result: base + lambda tau: the sign of sum_i delta_i and the largest |delta_i| of that sign; 0 if the sum is.
    By itself too large for a merged model.  Its use is `[emr, emr_masks]`, which stores tau once and cuts each task
    out of it by a mask and a factor.
    """

    paper = "EMR-Merging (Huang et al., NeurIPS 2024), arXiv:2405.17461, its elected task vector"

    lambda_: float | str = number(
        1.0, "factor of the elected task vector; 1 in front of emr_masks", options=(AUTO,), smooth=True
    )

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return self.lengths()

    def merge(self, site: Site) -> Tensor:
        deltas = site.deltas
        assert site.base is not None
        # Weights of 1: the paper's election is by mass, unweighted.
        elected = disjoint(deltas, elect_sign(deltas.detach()), (1.0,) * site.count, "max")
        return site.base + self.scaled(elected, site)
