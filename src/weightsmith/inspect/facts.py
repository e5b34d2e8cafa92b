"""From sums over entries to figures: the same for one tensor, a layer, a role and the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Matrix", "Measures", "SpectralMeasures", "independent", "measures", "outvoted_by_chance", "pairs"]

Number = float | None
"""None where a figure has no meaning: an angle with a task vector of zeros, say."""
Matrix = tuple[tuple[Number, ...], ...]


@dataclass(frozen=True)
class SpectralMeasures:
    """Means over the matrices measured, one entry per expert (matrices that an expert left as they were do not count).

    matrices         how many
    effective_rank   exp of the entropy of s_i / sum s
    effective_share  effective rank / smaller side
    stable_rank      sum s_i^2 / s_1^2
    kept             share of |tau|^2 in the side // n leading singular triplets
    curve            s_i / s_1 at evenly spaced places from the first to the last
    interference     singular task interference |(U'U - I) S (V'V - I)|_1, summed over the matrices, for all experts
    by_chance        the same in the Frobenius norm, over the matrices, / its root mean square for random directions
    """

    matrices: tuple[int, ...]
    effective_rank: tuple[Number, ...]
    effective_share: tuple[Number, ...]
    stable_rank: tuple[Number, ...]
    kept: tuple[Number, ...]
    curve: Matrix
    interference: float
    by_chance: Number


@dataclass(frozen=True)
class Measures:
    """What was measured over some tensors together, as if they were one vector; tuples have one entry per expert.

    tensors, entries  how many
    norm          |tau_i|, L2
    relative      |tau_i| / |base|
    size          mean |tau_i| over the entries that are not zero
    zeros         share of entries that are exactly zero
    cosine        [n][n] of task vectors
    base_cosine   of task vector and base
    to_one        lambda at which lambda * sum_i tau_i is as long as the task vectors are on average
    conflict      share, among entries that at least two experts changed, of those one raised and another lowered
    outvoted      share of sum_i |tau_i| that has the sign with less mass at its entry: what an election of signs loses
    chance        `outvoted` of independent task vectors that are as long and as sparse, tensor by tensor
    overlap       [n][n] Jaccard index of the top masks: the largest 20% of each tensor, without zeros
    outliers      share of entries above 6 root mean squares of their tensor
    peak          share of |tau_i|^2 in the largest 0.1% of each tensor's entries (at least one per tensor)
    spectra       None if no matrix was measured
    """

    tensors: int
    entries: int
    norm: tuple[Number, ...]
    relative: tuple[Number, ...]
    size: tuple[Number, ...]
    zeros: tuple[Number, ...]
    cosine: Matrix
    base_cosine: tuple[Number, ...]
    to_one: Number
    conflict: Number
    outvoted: Number
    chance: Number
    overlap: Matrix
    outliers: tuple[Number, ...]
    peak: tuple[Number, ...]
    spectra: SpectralMeasures | None


def pairs(matrix: Matrix) -> list[float]:
    """The entries above the diagonal that have a meaning."""
    return [v for i, row in enumerate(matrix) for v in row[i + 1 :] if v is not None]


def measures(totals: Mapping[str, Any]) -> Measures:
    """The figures that follow from totals of `survey`, and of `spectral_totals`, with 'tensors' and 'entries'."""
    found = {name: np.asarray(value) for name, value in totals.items()}
    gram, masks, entries = found["gram"], found["masks"], int(found["entries"])
    norms = np.sqrt(gram.diagonal())
    lengths, sizes = norms[1:], masks.diagonal()
    together = math.sqrt(max(gram[1:, 1:].sum(), 0.0))  # |sum tau_i|; rounding may leave a zero below zero
    return Measures(
        tensors=int(found["tensors"]),
        entries=entries,
        norm=_numbers(lengths),
        relative=_over(lengths, norms[:1]),
        size=_over(found["mass"], entries - found["zeros"]),
        zeros=_over(found["zeros"], entries),
        cosine=_matrix(gram[1:, 1:], np.outer(lengths, lengths), 1.0),
        base_cosine=_over(gram[0, 1:], norms[0] * lengths, 1.0),
        to_one=_over(lengths.mean(), together)[0] if together > 1e-9 * lengths.sum() else None,
        conflict=_over(found["clash"], found["shared"])[0],
        outvoted=_over(found["outvoted"], found["mass"].sum())[0],
        chance=_over(found["chance"], found["mass"].sum())[0],
        overlap=_matrix(masks, sizes[:, None] + sizes[None, :] - masks),
        outliers=_over(found["outliers"], entries),
        peak=_over(found["peak"], lengths**2),
        spectra=_spectral(found) if "spectra.matrices" in found else None,
    )


SUBSETS = 12
"""Number of experts up to which every subset of them is looked at; of more, 2 ** SUBSETS random ones."""


def independent(sizes: Sequence[float] | np.ndarray, shares: Sequence[float] | np.ndarray) -> float:
    """`outvoted` of independent normal task vectors, in expectation: (1 - E |sum_i x_i| / sum_i E |x_i|) / 2.

    sizes   root mean square of each one's changed entries
    shares  of entries that each one changed; which ones is independent too

    min(P, N) = (P + N - |P - N|) / 2 for the masses P and N of the two signs, and the sum over a subset S of experts is
    normal with variance sum_S size^2.  Equal sizes without zeros give (1 - 1 / sqrt n) / 2.
    """
    size, share = np.asarray(sizes, float), np.asarray(shares, float)
    if not (size * share).sum() > 0:
        return 0.0
    if len(size) <= SUBSETS:
        takes = (np.arange(2 ** len(size))[:, None] >> np.arange(len(size))) & 1 > 0
        weight = np.where(takes, share, 1 - share).prod(1)
    else:
        takes = np.random.default_rng(0).random((2**SUBSETS, len(size))) < share
        weight = np.full(len(takes), 1 / len(takes))
    together = float(weight @ np.sqrt(takes @ size**2))
    return max(0.0, (1 - together / float((size * share).sum())) / 2)


def outvoted_by_chance(totals: Mapping[str, Any], entries: int) -> float:
    """The mass that independent task vectors would lose to an election of signs, from one tensor's totals."""
    squares, changed = np.asarray(totals["gram"]).diagonal()[1:], entries - np.asarray(totals["zeros"])
    sizes = np.sqrt(np.divide(squares, changed, out=np.zeros(len(squares)), where=changed > 0))
    return independent(sizes, changed / entries) * float(np.asarray(totals["mass"]).sum())


def _spectral(found: Mapping[str, np.ndarray]) -> SpectralMeasures:
    count = found["spectra.matrices"]
    return SpectralMeasures(
        matrices=tuple(int(c) for c in count),
        effective_rank=_over(found["spectra.effective"], count),
        effective_share=_over(found["spectra.effective_share"], count),
        stable_rank=_over(found["spectra.stable"], count),
        kept=_over(found["spectra.kept"], count),
        curve=_matrix(found["spectra.curve"], np.broadcast_to(count[:, None], found["spectra.curve"].shape)),
        interference=float(found["spectra.sti"]),
        by_chance=_over(found["spectra.square"] ** 0.5, found["spectra.chance"] ** 0.5)[0],
    )


def _over(top: Any, bottom: Any, limit: float = math.inf) -> tuple[Number, ...]:
    """Quotients within +-limit; None where the divisor is zero or a number is not finite."""
    above, below = np.broadcast_arrays(np.atleast_1d(np.asarray(top, float)), np.asarray(bottom, float))
    return _numbers(np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0).clip(-limit, limit))


def _matrix(top: np.ndarray, bottom: np.ndarray, limit: float = math.inf) -> Matrix:
    return tuple(_over(a, b, limit) for a, b in zip(top, bottom, strict=True))


def _numbers(values: Sequence[float] | np.ndarray) -> tuple[Number, ...]:
    return tuple(float(v) if math.isfinite(v) else None for v in values)
