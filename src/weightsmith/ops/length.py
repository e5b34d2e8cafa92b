"""How long a merged change is to be: `lambda: auto` and `scaling: auto`.

A sum of n task vectors is n times as long as one of them where they agree, sqrt(n) times where they are orthogonal, as
those of unlike tasks are, and a mean that much shorter; a factor that suits two experts does not suit eight.  The rule,
tensor by tensor, with tau_i the task vectors before any filter and m the merged one at factor 1:

    methods that add or choose entries                 |lambda m| = mean_i |tau_i|
    methods that make task vectors orthogonal first    |lambda m| = sum_i |tau_i|^2 / |sum_i tau_i|

The second is sqrt(n) mean |tau_i| for orthogonal task vectors of one length, which then all keep theirs in m, and |tau|
for equal ones; |sum_i tau_i| counts as no shorter than for orthogonal ones.  So one expert gives lambda 1 (where m is
its task vector), n equal ones of a sum 1/n, n orthogonal ones of one length 1/sqrt(n), and no scale matters.  lambda is
at most n: where experts cancel each other, what is left is not blown up.

A reconstruction, from a study of two families of 8 and 9 experts (docs/study.md), not from a paper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core import kernel
from weightsmith.core.lazy import torch
from weightsmith.core.method import Filter, Method, Stage
from weightsmith.core.pass_ import Pass, Rows, State
from weightsmith.core.site import Site
from weightsmith.ops.reduce import block_squares, pairwise_sum, row_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AUTO", "Length", "Lengthened", "Scaled", "fitted", "lengthened"]

AUTO = "auto"


def fitted(merged: float, squares: Sequence[float], added: float | None = None) -> float:
    """The factor, from |m|^2 and all |tau_i|^2; added: |sum_i tau_i|^2, for the second rule.  0 where m is 0."""
    count, long = len(squares), sum(squares)
    if added is None:
        wanted = sum(square**0.5 for square in squares) / count
    else:
        wanted = long / max(added, long) ** 0.5 if long else 0.0
    return min(wanted / merged**0.5, float(count)) if merged else 0.0


@dataclass(frozen=True)
class Length(Pass[float]):
    """The factor of a method, or of a filter behind one, on one tensor, by the first rule.

    stage  with factor 1
    """

    stage: Method | Filter

    def see(self, site: Site) -> State:
        stage = self.stage
        made = stage.merge(site.at_zero()) if isinstance(stage, Method) else stage.apply(site).deltas[0]
        merged = made.detach()
        experts = (site.origin or site).deltas.detach()
        squares = torch.stack([row_squares(one) for one in (merged, *experts)])
        return {"squares": Rows(squares.cpu())}

    def end(self, total: Mapping[str, Any]) -> float:
        merged, *squares = pairwise_sum(np.asarray(total["squares"])).tolist()
        return fitted(merged, squares)

    def tells(self, result: float) -> Mapping[str, float]:
        """auto.NAME: the factor."""
        return {f"auto.{self.stage.name}": result}

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Lengths()


class Lengthened(Stage):
    """Beside a kind of stage: it has a factor `lambda` that may be auto."""

    lambda_: Any

    @property
    def length(self) -> Length | None:
        """The pass that finds the factor."""
        if self.lambda_ != AUTO:
            return None
        one: Any = replace(self, **{"lambda_": 1.0})
        return Length(one)

    def lengths(self) -> tuple[Pass[Any], ...]:
        """The same for `passes`: the last of them, for it merges."""
        return () if self.length is None else (self.length,)

    def scaled(self, merged: Tensor, site: Site) -> Tensor:
        """The merged task vector times lambda."""
        found: Tensor = merged * (self.lambda_ if self.length is None else site.result(self.length))
        return found


class Scaled(Method):
    """A method whose result is base + scaling m, with m, most of the work, the same for every scaling.

    The variants of a sweep over scalings share it.
    """

    scaling: Any

    @abstractmethod
    def merged(self, site: Site) -> Tensor:
        """m: the merged task vector at scaling 1, in the dtype of the base."""

    @property
    def shared(self) -> tuple[Any, Any]:
        """The method whose m it is, and the factor of m."""
        return replace(self, **{"scaling": 1.0}), self.scaling

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        alike, factor = self.shared

        def make() -> tuple[Tensor, Mapping[str, float]]:
            own = replace(site, told={})  # what is told on the way is told to all
            return alike.merged(own), own.told

        merged, told = site.once(alike, make)
        site.told.update(told)
        return site.base + lengthened(merged, site, factor, self.name)


def lengthened(merged: Tensor, site: Site, factor: Any, name: str) -> Tensor:
    """A whole merged tensor times its factor, which is told where it is found here, by the second rule."""
    if factor != AUTO:
        scaled: Tensor = merged * factor
        return scaled
    squares, added = [], torch.zeros_like(merged)
    for tau in _tasks(site):
        squares.append(float(block_squares(tau.detach())))
        added = added + tau.detach()
    found = fitted(float(block_squares(merged.detach())), squares, float(block_squares(added)))
    site.tell(f"auto.{name}", found)
    return merged * found


def _tasks(site: Site) -> Iterable[Tensor]:
    """The task vectors before any filter, one at a time."""
    first = site.origin or site
    return (left @ right for left, right in first.factors) if first.factors else first.tasks
