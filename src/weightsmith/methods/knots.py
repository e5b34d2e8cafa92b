"""Merge low-rank experts in a basis that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import dims
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Factored, Method, Pass, Scope, choice, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import AGGREGATES, disjoint, elect_sign, spread, weigh, weighted_sum
from weightsmith.ops.length import AUTO, fitted
from weightsmith.ops.noise import keep_masks
from weightsmith.ops.reduce import block_squares
from weightsmith.ops.select import Largest
from weightsmith.ops.spectral import Matrix, left_basis, matrices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Knots"]


@dataclass(frozen=True)
class Knots(Factored, Method, name="knots", needs=(BASE,), checks=(dims(2),), otherwise="keep"):
    """Merge LoRA experts by TIES, or the plain mean, in a singular basis that all share.

    Per matrix: [tau_1 | ... | tau_T] = U S [V_1 | ... | V_T]^T (shared left; right: the same of the transposes), so
    tau_t = U Z_t with Z_t = S V_t^T = U^T tau_t.  The Z_t are merged in place of the tau_t; result: base + U Z.

    1. Keep of each task the largest |z|, over all matrices: every entry at or above the (floor(d density) + 1)-th
       largest of d, as the authors' code does.  density 1 keeps all.
    2. rule ties: elect a sign per coordinate, `mass` of the sum of values, `count` of the sum of signs; keep what
       agrees.  A tied vote keeps nothing (the authors' sign there depends on the SVD's arbitrary signs).
       rule mean: keep everything.
    3. Multiply by `scaling`; mean (over the non-zero entries of each coordinate), sum, or the largest magnitude.

    `drop` is DARE on the coordinates: that share becomes 0 before step 1, the rest is divided by 1 - drop.
    Tensors that are no matrices stay the base's.  Singular values up to 1e-6 of the largest are rounding noise
    (the authors cut at 1e-5 absolute, which loses small adapters).  LoRA adapters on the recipe's base are merged
    from their factors: an SVD of [m, T r] per matrix in place of [m, T n].
    """

    paper = "KnOTS (Stoica et al., ICLR 2025), arXiv:2410.19735"

    density: Each = number(1.0, "share of each task's coordinates kept", above=0, high=1, each=True)
    scaling: Each | str = number(
        1.0, "factor of each task's coordinates", low=0, each=True, options=(AUTO,), smooth=True
    )
    rule: str = choice("ties", "what is kept of the coordinates", "ties", "mean")
    sign: str = choice("mass", "how signs are elected", "mass", "count")
    aggregate: str = choice("mean", "how the kept coordinates are combined", *AGGREGATES)
    drop: float = number(0.0, "share of coordinates dropped at random, the rest rescaled", low=0, below=1)
    shared: str = choice("left", "side of the shared basis: of the outputs or the inputs", "left", "right")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return () if self._cut(count) is None else (self._cut(count),)  # type: ignore[return-value]

    def merge(self, site: Site) -> Tensor:
        left, right = self.merged(site)
        assert site.base is not None
        return site.base + (left @ right).to(site.base.dtype)

    def merged(self, site: Site) -> tuple[Tensor, Tensor]:
        """The merged task vector as a product: left [rows, k], right [k, columns], float64; needs no base."""
        basis, coordinates = self.coordinates(site)  # U [m, k] float64; Z [n, k, columns]
        lengths = [float(block_squares(z.detach())) for z in coordinates] if self.scaling == AUTO else []
        if (cut := self._cut(site.count)) is not None:
            # Coordinates of all matrices of the model are cut at one threshold.
            (kept,) = site.result(cut).before(coordinates)
            coordinates = torch.where(kept, coordinates, 0.0)
        # Scaled after the trim: a scale does not change what is kept.
        auto = self.scaling == AUTO
        votes = weigh(coordinates, site.spread(1.0 if auto else self.scaling))  # type: ignore[arg-type]
        merged = self._combined(coordinates, votes).to(basis.dtype)
        if auto:  # U is orthonormal: coordinates are as long as what they stand for
            found = fitted(float(block_squares(merged.detach())), lengths)
            site.tell(f"auto.{self.name}", found)
            merged = merged * found
        return (basis, merged) if self.shared == "left" else (merged.T, basis.T)

    def coordinates(self, site: Site) -> tuple[Tensor, Tensor]:
        """U [m, k] in float64, and Z [n, k, columns] in the dtype of the task vectors."""
        found = matrices(site) if self.shared == "left" else [_turned(m) for m in matrices(site)]
        # [tau_1 | ... | tau_n] = U S [V_1 | ... | V_n]^T: one basis, and Z_i = S V_i^T the coordinates of task i.
        basis = left_basis(found)
        # Z_i = U^T tau_i, which needs no right singular vectors.
        z = torch.stack([_in_basis(basis, m) for m in found])
        if self.drop:
            # DARE on coordinates; the noise belongs to the place in Z.
            kept = keep_masks(site.with_deltas(z), (1 - self.drop,) * site.count, "knots")
            z = torch.where(kept, z / (1 - self.drop), 0.0)
        return basis, z

    def _cut(self, count: int) -> _Coordinates | None:
        densities = spread(self.density, count)
        basis = replace(self, density=1.0, scaling=1.0)  # what the coordinates do not depend on, as by default
        return None if set(densities) == {1} else _Coordinates(True, densities, basis, scope=Scope.MODEL)

    def _combined(self, coordinates: Tensor, votes: Tensor) -> Tensor:
        ones = (1.0,) * votes.shape[0]
        if self.rule == "ties":
            # Signs are elected before scaling, as in the authors' code.
            return disjoint(votes, elect_sign(coordinates.detach(), self.sign), ones, self.aggregate)
        if self.aggregate == "max":
            # Without an election: the largest |vote| of either sign, + where they are equal.
            plus, minus = (disjoint(votes, torch.full_like(votes[0], side), ones, "max") for side in (1.0, -1.0))
            return torch.where(plus >= -minus, plus, minus)
        added = weighted_sum(votes)
        # Dropped coordinates do not count in the mean.
        return added / (votes != 0).sum(0).clamp(min=1) if self.aggregate == "mean" else added


@dataclass(frozen=True)
class _Coordinates(Largest):
    """Cuts among the coordinates in the shared basis."""

    knots: Knots = None  # type: ignore[assignment]

    @property
    def viewed(self) -> Knots:
        return self.knots

    def values(self, site: Site) -> Tensor:
        return self.knots.coordinates(site)[1]


def _turned(matrix: Matrix) -> Matrix:
    return (matrix[1].T, matrix[0].T) if isinstance(matrix, tuple) else matrix.T


def _in_basis(basis: Tensor, matrix: Matrix) -> Tensor:
    """U^T tau: [k, columns], in the task vector's dtype."""
    if isinstance(matrix, tuple):
        return ((basis.T @ matrix[0].double()) @ matrix[1].double()).to(matrix[0].dtype)
    return (basis.T @ matrix.double()).to(matrix.dtype)
