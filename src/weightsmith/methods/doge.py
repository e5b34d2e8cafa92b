"""One correction for all task vectors, learnt by projected gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import Case, Verdict, dims, leave
from weightsmith.core.errors import some
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Pass, Scope, Whole, flag, integer, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.descent import adam
from weightsmith.ops.interference import frobenius
from weightsmith.ops.reduce import pairwise_sum
from weightsmith.ops.select import Largest
from weightsmith.ops.spectral import top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Doge"]


@dataclass(frozen=True)
class Doge(Whole, Method, name="doge", aliases=("doge_ta",), needs=(BASE,), checks=(dims(2),), otherwise="keep"):
    """Give all tasks one norm, add one shared correction, and keep each task's largest changes.

    For T matrices tau_j, [m, n], p = min(m, n):
    1. lambda_j = lambda / |tau_j|_F (0 where tau_j is 0).
    2. B: the p // subspace leading left singular vectors of [U_1 .. U_T], U_j the p // T leading ones of tau_j.
    3. delta starts at 0 and lowers sum_j |row sums of tau_j * (tau_j - sum_i lambda_i (tau_i + delta))|^2 by Adam,
       whose gradients g lose their part in the shared space: g - B B^T g.
    4. mask_j: where |tau_j| is at or above the (int(density d) + 1)-th largest of all d entries of expert j in the
       matrices that doge merges, over the whole model.
    5. Result: base + sum_j lambda_j mask_j (tau_j + delta).  All other tensors stay the base's, embeddings and
       output layers too unless `embeddings` says otherwise.

    `lambda` is absolute: 0.07 suits CLIP ViT-B/32, other models need a search; a run says how large it made the merged
    task vector.  The descent runs in float64, because entries with
    gradients near 0 turn on the last digits.  Gradients to the experts take delta and lambda_j for constants.
    """

    paper = (
        "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent (Wei et al., ICML 2025), "
        "arXiv:2501.01230"
    )

    lambda_: float = number(0.07, "norm of every task vector in every matrix", above=0)
    subspace: int = integer(6, "the protected space is spanned by 1 / subspace of all directions", low=1)
    density: float = number(0.3, "share of each task vector kept (K)", above=0, high=1)
    iters: int = integer(400, "steps of Adam", low=0)
    lr: float = number(1e-4, "learning rate: about the most an entry of delta moves per step", above=0)
    embeddings: bool = flag(False, "merge embeddings and output layers too, which else stay the base's")

    def check(self, case: Case) -> Iterable[Verdict]:
        left = not self.embeddings and case.key is not None and case.key.role in ("embed", "head")
        return leave("embeddings and output layers" if left else None)

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return (self._cut(count),) if self.density < 1 else ()

    def _cut(self, count: int) -> Largest:
        # As TIES trims: over the whole model, equals at the cut stay.
        return Largest(True, (self.density,) * count, scope=Scope.MODEL)

    def merge(self, site: Site) -> Tensor:
        deltas = site.deltas
        norms = [float(frobenius(delta)) for delta in deltas]
        # lambda_i = lambda / |tau_i|: every task vector comes out at norm lambda, in every matrix.
        factors = [self.lambda_ / norm if norm else 0.0 for norm in norms]
        # delta is the same for all tasks and a constant to gradients.
        with torch.no_grad():
            correction = self._correction(deltas.detach(), factors)
        corrected = deltas + correction.to(deltas.dtype)
        if self.density < 1:
            # The mask is that of tau_i before the correction, as in the authors' code.
            (kept,) = site.result(self._cut(site.count)).before(deltas, site.start)
            corrected = torch.where(kept, corrected, 0.0)
        merged = weighted_sum(corrected, factors)
        site.tell("doge.free", float(min(site.block_shape) < self.subspace))
        assert site.base is not None
        return site.base + merged

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        if free := [tensor for tensor, found in told.items() if found.get("doge.free")]:
            yield f"subspace = {self.subspace} protects no direction of {some(free, 1)}"

    def _correction(self, deltas: Tensor, factors: list[float]) -> Tensor:
        """delta: [m, n] float64."""
        start = torch.zeros_like(deltas[0], dtype=torch.float64)
        # q = min(m, n) // subspace columns of B: with q = m, B B^T is the identity.
        if self.iters == 0 or min(start.shape) // self.subspace >= start.shape[0]:
            return start  # where all directions are protected, no gradient is left
        shared = self._shared_space(deltas)
        total = sum(factors)
        # Row r of every task, [m, T, n]: sum_c tau_j (tau_j - sum_i lambda_i tau_i), to be met by total tau_j delta.
        rows = deltas.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
        tasks = rows.transpose(0, 1)  # a view [T, m, n]
        added = weighted_sum(tasks, factors)
        # [m, T, 1]; row by row, for delta acts on every row by itself.
        goal = torch.stack([pairwise_sum((tau - added).mul_(tau)) for tau in tasks], 1)[..., None]
        # Matrices of the model's largest layer, in float64: 128 MB each at 4096 x 4096.
        del added, tasks

        def gradient(delta: Tensor) -> Tensor:
            missed = goal - total * (rows @ delta[:, :, None])  # [m, T, 1]: what is left of the conflict
            g = (-2 * total * missed.transpose(1, 2) @ rows)[:, 0]
            # The projection: delta never moves along the shared directions, so they keep what the tasks agree on.
            return g - shared @ (shared.T @ g)

        return adam(gradient, start, self.iters, self.lr)

    def _shared_space(self, deltas: Tensor) -> Tensor:
        """B [m, q]: what the leading left singular vectors of all tasks have in common first."""
        smaller = min(deltas.shape[1:])
        # smaller // T directions of each of T tasks: [m, about smaller].
        leading = torch.cat([top_svd(delta, smaller // len(deltas)).u for delta in deltas], 1)
        return top_svd(leading, smaller // self.subspace).u
