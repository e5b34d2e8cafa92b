"""Every expert as the leading singular triplets of its task vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import dims
from weightsmith.core.keys import Key, Part
from weightsmith.core.method import BASE, Factored, StandaloneCodec, number
from weightsmith.core.site import Site
from weightsmith.ops.spectral import low_rank, matrices, padded, svd_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tsvc"]


@dataclass(frozen=True)
class Tsvc(Factored, StandaloneCodec, name="tsvc", needs=(BASE,), streams=1, checks=(dims(2),), otherwise="exact"):
    """Store the leading singular directions of every change.

    Kept: the k = floor(rank_fraction min(m, n)) leading triplets U, S, V of each task vector, at least one.
    Size: k (m + n + 1) numbers per matrix and expert, besides the base.  The relative error of a task vector is
    sqrt(sum of dropped s^2 / sum of all s^2).  All other tensors are stored as they are (`exact`).  LoRA adapters on
    the recipe's base are decomposed from their factors.
    """

    paper = "TSV-Compress of Task Singular Vectors (Gargiulo et al., CVPR 2025), arXiv:2412.00081"

    rank_fraction: float = number(0.1, "share of singular triplets kept", above=0, high=1)

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        return tuple(part for e in experts for part in low_rank_parts(key, self._rank(key), e))

    def encode(self, site: Site) -> dict[str, Tensor]:
        rank = self._rank(site.key)
        found: dict[str, Tensor] = {}
        for expert, matrix in zip(site.names, matrices(site), strict=True):
            # Parts have a fixed size: a change of a lower rank gets triplets of zeros.
            triplets = padded(svd_of(matrix, rank), rank)
            found |= {f"{site.key.name}::{side}.{expert}": t for side, t in triplets._asdict().items()}
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        return base + low_rank(parts)

    def _rank(self, key: Key) -> int:
        return kept_rank(key, self.rank_fraction)


def kept_rank(key: Key, share: float) -> int:
    """How many triplets of a matrix a share of them is: rounded down, at least one."""
    smaller = min(key.shape)
    # 1e-9: 0.1 of 30 is 3, whatever the binary fraction says.
    return min(max(int(smaller * share + 1e-9), 1), smaller)


def low_rank_parts(key: Key, rank: int, expert: str) -> tuple[Part, ...]:
    """u [m, k] by rows of the matrix; s [k] and v [n, k] whole."""
    # Rows of the weight need their rows of u, and all of s and v.
    rows, columns = key.shape
    return (
        Part.of(key, "u", (rows, rank), max(columns, 1), expert),
        Part.of(key, "s", (rank,), 0, expert),
        Part.of(key, "v", (columns, rank), 0, expert),
    )
