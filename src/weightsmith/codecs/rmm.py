"""Many low-rank experts as a few basis vectors per position and coefficients per expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import Case, Verdict, dims, refuse, remark
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Factored, StandaloneCodec, choice, flag, integer
from weightsmith.core.site import Site
from weightsmith.ops.spectral import Matrix, matrices, padded, svd_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rmm", "balanced"]


@dataclass(frozen=True)
class Rmm(Factored, StandaloneCodec, name="rmm", needs=(BASE,), streams=1, checks=(dims(2),), otherwise="exact"):
    """Store low-rank changes in a basis that all experts share.

    n experts delta_i ~ L_i R_i^T of rank r take the room of p of them; any expert can be rebuilt.
    The factors L_i [m, r] and R_i [d, r] are each reduced by themselves.  level position: at every row, the n vectors
    x_i in R^r become their mean, the p leading directions around it, and p coefficients each: optimal, and exact from
    p = min(r, n - 1) on.  level tensor: the same once for the whole factor as one vector, p coefficients in all.

    Size relative to n adapters: (p (r + n) + r) / (r n) by position, about (p + 1) / n by tensor; a p that saves
    nothing is refused.  Other tensors are stored as they are (`exact`).

    canonicalise  factors are L Q, R Q^-T for any Q: none takes those of an adapter as they come (the paper);
                  svd: U sqrt(S), V sqrt(S), the largest entry of each u positive; procrustes: these turned onto the
                  first expert's
    Full models, and adapters of a higher rank, are truncated to rank r first.
    """

    paper = "Towards Reversible Model Merging For Low-rank Weights (2025), arXiv:2510.14163; our reconstruction"

    rank: int = integer(16, "rank r of the factors", low=1)
    basis: int = integer(2, "basis vectors p", low=1)
    center: bool = flag(True, "subtract the mean first")
    level: str = choice("position", "what has a basis of its own", "position", "tensor")
    canonicalise: str = choice("procrustes", "in which coordinates factors are compared", "none", "svd", "procrustes")

    def check(self, case: Case) -> Iterable[Verdict]:
        if case.count == 1:
            return remark(f"one model shares nothing: its changes are only cut to rank {self.rank}")
        count, r, p = case.count, self.rank, self._basis(self.rank, case.count)
        # Numbers stored per position: p vectors of r, p coefficients for each expert, the mean; n r without.
        size = (p * (r + count) + r * self.center) / (r * count) if self.level == "position" else (p + 1) / count
        if size > 1:
            return refuse(
                f"basis = {self.basis} of rank {r} for {count} models takes {size:.0%} of the room of the models "
                "themselves; lower basis, or set level: tensor"
            )
        return ()

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        rank = min(self.rank, *key.shape)
        p = self._basis(rank, len(experts))
        found: list[Part] = []
        for side, size in zip("lr", key.shape, strict=True):
            # L goes with the rows of the weight; R is needed whole for any row.
            span = max(key.row_numel, 1) if side == "l" else 0
            found += [Part.of(key, f"{side}.mean", (size, rank), span)] * self.center
            found.append(Part.of(key, f"{side}.basis", (size, rank, p), span))
            own = ((size, p), span) if self.level == "position" else ((1, p), 0)
            found += [Part.of(key, f"{side}.own", *own, e) for e in experts]
        return tuple(found)

    def encode(self, site: Site) -> dict[str, Tensor]:
        rank = min(self.rank, *site.key.shape)
        pairs = self._pairs(site, rank)  # [n] of L_i [m, r], R_i [d, r], float64
        p, name = self._basis(rank, site.count), site.key.name
        found: dict[str, Tensor] = {}
        for i, side in enumerate("lr"):
            mean, basis, own = self._reduced(torch.stack([pair[i] for pair in pairs]), p)
            found |= {f"{name}::{side}.basis": basis} | ({f"{name}::{side}.mean": mean} if self.center else {})
            found |= {f"{name}::{side}.own.{e}": c for e, c in zip(site.names, own, strict=True)}
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        left, right = (
            # [size, r, p] x [size or 1, 1, p] -> [size, r]
            (parts[f"{side}.basis"] * parts[f"{side}.own"][:, None, :]).sum(-1) + parts.get(f"{side}.mean", 0)
            for side in "lr"
        )
        return base + left @ right.T

    def _basis(self, rank: int, count: int) -> int:
        """p, no larger than what makes the rebuilt factors exact."""
        # n vectors less their mean span n - 1 directions.
        most = count - 1 if self.center else count
        return min(self.basis, most, rank) if self.level == "position" else min(self.basis, most)

    def _reduced(self, x: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
        """[n, size, r] -> mean [size, r], basis [size, r, p], coefficients [n, size or 1, p]."""
        mean = x.mean(0) if self.center else torch.zeros_like(x[0])
        spread = (x - mean).permute(1, 2, 0)  # [size, r, n]
        flat = spread if self.level == "position" else spread.reshape(1, -1, x.shape[0])
        # [size, r, k], [size, k], [size, k, n]: thin, one per position
        u, s, vt = torch.linalg.svd(flat, full_matrices=False)
        own = (s[:, :p, None] * vt[:, :p]).permute(2, 0, 1)  # [n, size or 1, p]
        return mean, u[..., :p].reshape(*spread.shape[:2], p), own

    def _pairs(self, site: Site, rank: int) -> list[tuple[Tensor, Tensor]]:
        found = [self._pair(matrix, rank) for matrix in matrices(site)]
        if self.canonicalise != "procrustes":
            return found
        first_left, first_right = found[0]
        turned = []
        for left, right in found:
            # argmin_Q |L Q - L_1|^2 + |R Q - R_1|^2 over orthogonal Q
            p, _, qt = torch.linalg.svd(left.T @ first_left + right.T @ first_right)
            # L Q (R Q)^T = L R^T: the product does not change.
            turned.append((left @ (p @ qt), right @ (p @ qt)))
        return turned

    def _pair(self, matrix: Matrix, rank: int) -> tuple[Tensor, Tensor]:
        if self.canonicalise == "none" and isinstance(matrix, tuple) and matrix[0].shape[1] <= rank:
            # An adapter of a lower rank has columns of zeros.
            grow = (0, rank - matrix[0].shape[1])
            return tuple(torch.nn.functional.pad(side.double(), grow) for side in (matrix[0], matrix[1].T))  # type: ignore[return-value]
        return balanced(matrix, rank)


def balanced(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor]:
    """L = U sqrt(S) [m, r], R = V sqrt(S) [d, r] of the leading triplets, the largest entry of each u positive."""
    u, s, v = padded(svd_of(matrix, rank), rank)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    root = s.sqrt() * torch.where(signs == 0, 1.0, signs)
    return u * root, v * root
