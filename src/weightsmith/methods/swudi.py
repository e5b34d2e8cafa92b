"""WUDI as a filter on the spectrum of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import dims
from weightsmith.core.method import BASE, Whole, choice, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.interference import STARTS, flowed
from weightsmith.ops.length import Scaled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Swudi"]


@dataclass(frozen=True)
class Swudi(Whole, Scaled, name="swudi", needs=(BASE,), checks=(dims(2),), otherwise=scaled_mean, apart=True):
    """Lower `wudi`'s loss in the leading directions only, in closed form.

    The closed form is that of gradient flow for a time.
    C = sum_i tau_i^T tau_i / |tau_i|^2 = Q diag(l) Q^T, [n, n]; D = sum_i tau_i tau_i^T tau_i / |tau_i|^2;
    f_j = 1 - exp(-l_j time) for the floor(rank_ratio n + 0.999) largest eigenvalues, 0 for the others;
    M = M0 - M0 Q diag(f) Q^T + D Q diag(f / l) Q^T.  Result: base + scaling M; tensors that are not matrices get
    base + scaling mean(tau).

    time inf is the minimiser within those directions, time 0 the start.  Eigenvalues count as at least
    `min_eigenvalue` (C has trace 1 per task, whatever the size of the task vectors).  init zero starts, and stays
    outside the leading directions, at 0.  With init sum the result is about n times as large as a task vector.
    The authors use rank_ratio 0.65 for CLIP and 0.85 for language models.  One eigendecomposition per matrix.
    """

    paper = "OptMerge (Wei et al., ICLR 2026), arXiv:2505.19892: spectral WUDI in its authors' code"

    time: float | str = number(300.0, "time of the gradient flow", low=0, options=("inf",))
    rank_ratio: float = number(0.65, "share of the eigenvalues that take part", above=0, high=1)
    init: str = choice("sum", "where M starts", *STARTS)
    min_eigenvalue: float = number(1e-8, "eigenvalues below this count as this", above=0)
    scaling: float = number(1.0, "factor of the merged task vector", smooth=True)

    def merged(self, site: Site) -> Tensor:
        # C is [n, n], n the inputs of the layer: that is what a share of the eigenvalues is a share of.
        count = max(1, int(site.block_shape[1] * self.rank_ratio + 0.999))
        return flowed(site.deltas, self.init, float(self.time), self.min_eigenvalue, lambda _: count)
