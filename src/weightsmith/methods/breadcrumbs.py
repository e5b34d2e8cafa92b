"""Mask both tails of every task vector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import Case, Verdict, remark, remark_here
from weightsmith.core.kernel import Window
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Pass, choice, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import spread
from weightsmith.ops.rescale import L1, Masking
from weightsmith.ops.select import Cut, leading

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Breadcrumbs"]


@dataclass(frozen=True)
class Breadcrumbs(Masking, name="breadcrumbs", needs=(BASE,)):
    """Drop the smallest changes and the very largest ones.

    What survives is ranked R+1 .. R+K by falling |delta|:

    tensor  ranks over the tensor (the paper's text, mergekit): K = int(density numel), R = int(remove_top numel),
            R cut down so that K survive; density 1 leaves the tensor as it is.
    row     ranks over each slice along the last axis (the authors' code), m long: K = int(m density),
            R = int(m remove_top).  A vector is one row.  `remove_first: false` takes the R largest out of the
            K kept, so that ranks R+1 .. K survive.
    Equals go by lower index.  Single numbers (0-dim) stay as they are.  Rows are as stored: for GPT-2's
    transposed layers they run along the outputs.  The paper calls the tails beta and gamma, its code
    `beta` (density) and `gamma` (remove_top).  The authors start at row, density 0.15, remove_top 0.006 and
    task_arithmetic with lambda 0.2 of the sum.
    """

    paper = "Model Breadcrumbs (Davari and Belilovsky, ECCV 2024), arXiv:2312.06795"

    density: Each = number(0.9, "share of entries kept", above=0, high=1, each=True)
    remove_top: Each = number(0.01, "share of the largest entries dropped", low=0, below=1, each=True)
    scope_: str = choice("tensor", "what entries are ranked over", "tensor", "row")
    remove_first: bool = flag(True, "row: drop the largest before counting those kept")
    rescale: bool = flag(False, "keep each tensor's L1 norm")

    def masking(self, count: int) -> tuple[Pass[Any], ...]:
        return (self._tails(count),)

    def check(self, case: Case) -> Iterable[Verdict]:
        emptied = None if case.key is None else self._emptied(case.key, case.count)
        return (*remark(self._shortened(case.count)), *remark_here(emptied))

    def _shortened(self, count: int) -> str | None:
        """Of rows, whose window may fall off the end; that of a tensor is moved instead."""
        # [n] pairs (density, remove_top).
        shares = list(zip(spread(self.density, count), spread(self.remove_top, count), strict=True))
        if self.scope_ == "tensor" or not self.remove_first or all(sum(share) <= 1 + 1e-9 for share in shares):
            return None
        left = ", ".join(dict.fromkeys(f"{min(density, 1 - top):.3g}" for density, top in shares))
        return f"density + remove_top is more than 1: of each row only {left} survives"

    def _emptied(self, key: Key, count: int) -> str | None:
        # What is ranked together: the tensor, or a row.
        total = key.numel if self.scope_ == "tensor" else key.shape[-1] if key.shape else 0
        if not (key.shape and total) or all(first < last for first, last in self._tails(count).ranks(total)):
            return None
        return f"with these shares no entry of only {total} survives, so nothing changes there"

    def fused(self, count: int) -> Window | None:
        # The kernels rank over a tensor; rows are sorted in torch.
        return Window(self._tails(count), L1(self) if self.rescale else None) if self.scope_ == "tensor" else None

    def masked(self, site: Site) -> Tensor:
        deltas, tails = site.deltas, self._tails(site.count)
        # A number has no tails.
        if not site.key.shape:
            return deltas
        if tails.applies(site.key):
            first, last = site.result(tails).before(deltas, site.start)
        else:
            # Rows are whole in every block, so no pass is needed: [n, 2] ranks of a row of m.
            ranks = tails.ranks(site.key.shape[-1])
            first, last = (
                torch.stack([leading(d, r[side]) for d, r in zip(deltas, ranks, strict=True)]) for side in (0, 1)
            )
        # Before the second cut and not before the first; ~: the first R are the largest.
        return torch.where(last & ~first, deltas, 0.0)

    def _tails(self, count: int) -> _Tails:
        shares = zip(spread(self.density, count), spread(self.remove_top, count), strict=False)
        return _Tails(shares=tuple(shares), by_row=self.scope_ == "row", first=self.remove_first)


@dataclass(frozen=True)
class _Tails(Cut):
    """Two cuts per task vector: the survivors lie after the first and before the second.

    shares  (density, remove_top) of each
    by_row  rank each row by itself: then only a vector, which is one row, is measured
    first   drop the largest before counting those kept
    """

    shares: tuple[tuple[float, float], ...] = ()
    by_row: bool = False
    first: bool = True

    def applies(self, key: Key) -> bool:
        return len(key.shape) == 1 or (not self.by_row and len(key.shape) > 0)

    def ranks(self, total: int) -> list[list[int]]:
        return [self._window(total, *share) for share in self.shares]

    def _window(self, total: int, density: float, remove_top: float) -> list[int]:
        """The survivors, as [first, last) in the ranking."""
        kept, dropped = int(total * density), int(total * remove_top)
        # The authors' code: the window may reach beyond the row, or be empty.
        if self.by_row:
            return [dropped, dropped + kept] if self.first else [min(dropped, kept), kept]
        if density >= 1:
            return [0, total]
        # mergekit: the top gives way, so that K entries survive.
        tail = max(0, total - kept - dropped)  # smallest entries dropped
        return [total - tail - kept, total - tail]
