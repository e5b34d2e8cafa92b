"""Products of two thin matrices: sums, best approximations, and the rules of adapters, without forming the product.

Sources: Hu et al., arXiv:2106.09685 (LoRA); Eckart and Young (1936) for the best approximation of a given rank;
Yadav et al., arXiv:2306.01708 (TIES); Yu et al., arXiv:2311.03099 (DARE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from weightsmith.core.lazy import torch
from weightsmith.ops.combine import disjoint, elect_sign, weigh, weighted_sum
from weightsmith.ops.noise import bernoulli
from weightsmith.ops.select import leading
from weightsmith.ops.spectral import Svd, qr_core

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "VOTES",
    "Factors",
    "agreed_mean",
    "clamped",
    "distance",
    "drop",
    "prune",
    "rank_for",
    "signed",
    "size",
    "split",
    "stacked",
    "svd_of_factors",
    "widened",
]

VOTES = ("total", "frequency", "weighted")
_ROUNDING = 1e-13
"""Singular values of b a, relative to |b| |a|, up to which float64 arithmetic leaves rounding only."""
_SLACK = 1e-12
"""Relative error of a sum of squares: a share that is missed by this is reached."""


class Factors(NamedTuple):
    """b [m, r] and a [r, n], of the matrix b a [m, n]."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """Columns of b: no more than this is the rank of b a."""
        return self.a.shape[0]

    @property
    def product(self) -> Tensor:
        return self.b @ self.a


def stacked(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_i w_i b_i a_i exactly, at rank sum_i r_i: b = [b_1 | b_2 | ...], a = [w_1 a_1; w_2 a_2; ...]."""
    # The weights go into a alone: sqrt of a negative one has no real root to share out.
    b = torch.cat([part.b for part in parts], 1)
    return Factors(b, torch.cat([part.a * weight for part, weight in zip(parts, weights, strict=True)], 0))


def svd_of_factors(found: Factors) -> Svd:
    """All singular triplets of b a from the QR of both and an SVD of their core: O((m + n) r^2), float64.

    What is rounding only, measured against the factors (they may cancel), is left out.
    """
    cut = qr_core(found.b, found.a.T)
    # Relative to the factors, not to the largest singular value: adapters that cancel leave nothing but noise.
    noise = _ROUNDING * float(found.b.double().norm()) * float(found.a.double().norm())
    rank = int((cut.s > noise).sum())
    return signed(Svd(cut.u[:, :rank], cut.s[:rank], cut.v[:, :rank]))


def signed(found: Svd) -> Svd:
    """The same with each column of u turned so that its largest entry is positive (the first of equals)."""
    if not found.s.shape[0]:
        return found
    # LAPACK leaves the sign of a triplet open; with the rule files are the same on all machines. [1, k]
    top = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(found.u.dtype)
    return Svd(found.u * sign, found.s, found.v * sign)


def rank_for(
    s: Tensor, square: float, *, rank: int | None = None, energy: float | None = None, floor: float = 0.0
) -> int:
    """How many of the falling singular values to keep.

    square  sum of the squares of all singular values, those that are not in `s` included
    rank    at most so many
    energy  the fewest whose squares make up this share of `square`
    floor   only those above it
    """
    count = int((s > floor).sum())
    if energy is not None and count:
        # argmax finds the first True.
        reached = s.square().cumsum(0) >= energy * square * (1 - _SLACK)
        count = min(count, int(reached.int().argmax()) + 1 if bool(reached.any()) else count)
    return count if rank is None else min(count, rank)


def split(found: Svd, rank: int, *, even: bool) -> Factors:
    """The leading `rank` triplets as factors: sqrt(s) on either side, or all of s in b."""
    u, s, v = found.u[:, :rank], found.s[:rank], found.v[:, :rank]
    if even:
        # Adapters train on with factors of equal size.
        root = s.sqrt()
        return Factors(u * root, root[:, None] * v.T)
    return Factors(u * s, v.T.contiguous())


def clamped(found: Factors, quantile: float) -> Factors:
    """Both factors clipped to +- the quantile of all their |entries| (linear between two entries)."""
    # torch.quantile refuses more than 2^24 entries; this is its linear rule.
    sizes = torch.cat([found.b.reshape(-1), found.a.reshape(-1)]).abs().sort().values
    place = quantile * (len(sizes) - 1)
    low, high = sizes[math.floor(place)], sizes[math.ceil(place)]
    bound = float(low + (high - low) * (place - math.floor(place)))
    return Factors(found.b.clamp(-bound, bound), found.a.clamp(-bound, bound))


def widened(found: Factors, rank: int) -> Factors:
    """The same matrix at a larger nominal rank: the columns and rows that are missing are zero."""
    pad = torch.nn.functional.pad
    missing = rank - found.rank
    return Factors(pad(found.b, (0, missing)), pad(found.a, (0, 0, 0, missing)))


def size(found: Factors) -> float:
    """The Frobenius norm of b a: that of R_b R_a^T, from the QR of both."""
    # [r, r]: the orthonormal factors do not change the norm.
    left = torch.linalg.qr(found.b.double()).R
    right = torch.linalg.qr(found.a.double().T).R
    return float((left @ right.T).norm())


def distance(one: Factors, other: Factors) -> float:
    """|b a - b' a'| in the Frobenius norm, without forming either (no Gram matrix: that would lose half the digits)."""
    # b a - b' a' = [b | b'] [a; -a'], at rank r + r'.
    wide = [Factors(part.b.double(), part.a.double()) for part in (one, other)]
    return size(stacked(wide, (1.0, -1.0)))


# --- the elementary rules, on tensors of any shape ---------------------------------------------------


def prune(x: Tensor, density: float) -> Tensor:
    """Keep the int(density numel) entries of largest magnitude, equals by lower index; the others become 0."""
    kept = leading(x.reshape(-1), int(density * x.numel())).reshape(x.shape)
    return torch.where(kept, x, 0.0)


def drop(x: Tensor, density: float, seed: int, name: str, expert: str) -> Tensor:
    """Keep each entry with probability `density` and divide it by that; masks are keyed by (seed, name, expert)."""
    # 0 / 0 below
    if density == 0:
        return torch.zeros_like(x)
    kept = torch.from_numpy(bernoulli(seed, name, expert, "dare", 0, x.numel(), density)).reshape(x.shape)
    return torch.where(kept, x, 0.0) / density


def agreed_mean(stack: Tensor, weights: Sequence[float], vote: str) -> Tensor:
    """The mean of w_i x_i over the entries whose sign won: [n, *shape] -> [*shape].

    total      the sign of sum_i x_i wins; a sum of 0 counts as +
    frequency  the sign of sum_i sign(x_i)
    weighted   the sign of sum_i w_i x_i, so that a negative weight turns a vote

    Divided by the number of entries that agree, whatever their weights; zeros never agree.
    """
    votes = weigh(stack, weights) if vote == "weighted" else stack
    elected = elect_sign(votes, "count" if vote == "frequency" else "mass")
    # peft counts a tie as +.
    elected = torch.where(elected == 0, 1.0, elected)
    if vote == "weighted":
        # The weights are in the votes already: the divisor counts who agrees.
        return disjoint(votes, elected, (1.0,) * len(weights), "mean")
    agrees = stack.sign() == elected
    kept = torch.where(agrees, weigh(stack, weights), 0.0)
    # Where nobody agrees the sum is 0, and so is 0 / 1.
    return weighted_sum(kept) / agrees.sum(0).clamp(min=1)
