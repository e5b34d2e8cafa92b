"""Equally strong common and task-specific directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import Case, Verdict, dims, remark_here
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Factored, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.length import AUTO, Scaled
from weightsmith.ops.spectral import NOISE, Svd, matrices, orthogonal_sum, outside, svd_of, total

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IsoCts"]


@dataclass(frozen=True)
class IsoCts(
    Factored, Scaled, name="iso_cts", needs=(BASE,), streams=2, checks=(dims(2),), otherwise=scaled_mean, apart=True
):
    """Flatten the spectrum as `iso_c` does, and keep some directions of each expert's own.

    Those are taken from what each task vector has outside the common space.
    Matrices m x n, p = min(m, n), T task vectors: d = round((p - floor(p common_space_fraction)) / T) directions per
    task and c = p - T d common ones (round half to even; d is at most p // T).  Common: the c leading singular
    triplets of sum_t tau_t, left vectors U_c.  Task t: the d leading triplets of tau_t - U_c U_c^T tau_t.  All
    side by side, U and V are replaced by their polar factors and every singular value by the mean of those kept:
    base + scaling mean(s) U V^T.  With d = 0 (more models than rows, fraction 1) this is iso_c.

    Triplets of rounding noise (1e-6 of the largest) are left out, as in iso_c.  Other tensors: mean of tau_t.
    Better than iso_c from about 14 models on.
    """

    paper = "Iso-CTS (Marczak et al., ICML 2025), arXiv:2502.04959"

    scaling: float | str = number(1.0, "factor of the flattened task vector", options=(AUTO,), smooth=True)
    common_space_fraction: float = number(0.8, "share of directions taken from the common space", low=0, high=1)

    def check(self, case: Case) -> Iterable[Verdict]:
        if case.key is None or self._ranks(min(case.key.shape), case.count)[1]:
            return ()
        return remark_here(f"no direction of its own is left for each of {case.count} models, so this is iso_c")

    def merged(self, site: Site) -> Tensor:
        assert site.base is not None
        common, own = self._ranks(min(site.block_shape), site.count)  # c and d of the docstring
        tasks = matrices(site)
        # The common space, and what lies outside of it, task by task: a second walk.
        shared = svd_of(total(tasks), common)
        parts = [svd_of(outside(task, shared.u), own) for task in tasks] if own else []
        # Experts inside the common space leave rounding noise outside of it.
        floor = NOISE * float(shared.s.detach().max()) / site.count if shared.s.numel() else 0.0
        parts = [Svd(u[:, s > floor], s[s > floor], v[:, s > floor]) for u, s, v in parts]
        # All singular values that are kept, of every space, have one mean.
        strength = torch.cat([p.s for p in (*parts, shared)])
        if not strength.numel():
            return torch.zeros_like(site.base)
        # Bases only; the factor comes after the sum, as a number.
        even = [p._replace(s=torch.ones_like(p.s)) for p in (*parts, shared)]
        flat = orthogonal_sum(even, dtype=site.base.dtype) * strength.mean()
        return flat.to(site.base.dtype)

    def _ranks(self, size: int, count: int) -> tuple[int, int]:
        """(directions of the common space, of each task)."""
        # 1e-9: 0.8 * 30 is 24, whatever the binary fraction says.  round is half to even, as in the authors' code.
        wanted = round((size - int(size * self.common_space_fraction + 1e-9)) / count)
        own = min(wanted, size // count)
        return size - own * count, own
