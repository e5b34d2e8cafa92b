"""Filters that mask task vectors, and matching the L1 norm of what is left to that of the whole, tensor by tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core import kernel
from weightsmith.core.lazy import torch
from weightsmith.core.method import Filter
from weightsmith.core.pass_ import Pass, Rows, State
from weightsmith.core.site import Site
from weightsmith.ops.combine import per_expert
from weightsmith.ops.reduce import pairwise_sum, row_sizes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["L1", "Masking", "l1_factors", "l1_sums"]

TINY = 1e-7
"""Sums below this are not matched (as in mergekit)."""


@dataclass(frozen=True)
class Masking(Filter):
    """A filter that sets entries of task vectors to zero, and may multiply the others to keep each tensor's L1 norm."""

    @abstractmethod
    def masked(self, site: Site) -> Tensor:
        """The task vectors, [n, *block], zero where they are dropped."""

    @property
    def keeps_l1(self) -> bool:
        """Whether the L1 norm is kept; needs the passes of `rescaling`."""
        return bool(getattr(self, "rescale", False))

    def masking(self, count: int) -> tuple[Pass[Any], ...]:
        """The passes that `masked` needs."""
        return ()

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return (*self.masking(count), *((L1(self),) if self.keeps_l1 else ()))

    def apply(self, site: Site) -> Site:
        masked = self.masked(site)
        if self.keeps_l1:
            # float64 factors, rounded to the stack's dtype once: the kernels multiply by the same float32.
            masked = masked * per_expert(torch.from_numpy(site.result(L1(self))), masked)
        return site.with_deltas(masked)


@dataclass(frozen=True)
class L1(Pass[np.ndarray]):
    """The factors that give masked task vectors back their L1 norms: float64 [n]."""

    filter: Masking

    def see(self, site: Site) -> State:
        return l1_sums(site.deltas, self.filter.masked(site))

    def end(self, total: Mapping[str, Any]) -> np.ndarray:
        return l1_factors(total)

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Masses()


def l1_sums(whole: Tensor, masked: Tensor) -> State:
    """Per row sum |x| of a block of task vectors before and after masking, [n, *block] each."""
    # Row by row: sums over a block would depend on how the tensor is cut.
    stacks = (("whole", whole), ("masked", masked))
    return {name: Rows(torch.stack([row_sizes(d) for d in stack]).cpu()) for name, stack in stacks}


def l1_factors(total: Mapping[str, Any]) -> np.ndarray:
    """sum |delta| / sum |masked delta| per expert, 1 where either is below 1e-7: [n] float64."""
    # [n, rows] -> [n], in the fixed order over all rows
    whole, masked = (pairwise_sum(np.asarray(total[name])) for name in ("whole", "masked"))
    usable = (whole >= TINY) & (masked >= TINY)
    # The inner where: no division by 0, not even one that is thrown away.
    return np.where(usable, whole / np.where(usable, masked, 1.0), 1.0)
