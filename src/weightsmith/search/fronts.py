"""Pareto fronts of points with several scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from weightsmith.core.errors import WeightsmithError, did_you_mean

__all__ = ["front", "pick", "preferences", "shares"]

Array = NDArray[np.float64]


def front(scores: Array) -> NDArray[np.intp]:
    """The points that no other dominates: [n, k] scores, more is better -> their indices, in order.

    A point dominates another if it is at least as good everywhere and better somewhere; of equal points all stay.
    """
    scores = np.asarray(scores, np.float64)
    kept = []
    for i, one in enumerate(scores):  # row by row: n^2 k numbers at once would be gigabytes
        if not ((scores >= one).all(1) & (scores > one).any(1)).any():
            kept.append(i)
    return np.array(kept, np.intp)


def pick(scores: Array, weights: Sequence[float]) -> int:
    """The point that a preference likes best: argmax of sum_k r_k score_k with r = weights / |weights|_2."""
    r = np.asarray(weights, np.float64)
    if r.shape != np.shape(scores)[1:] or (r < 0).any() or not np.isfinite(r).all() or not r.any():
        raise WeightsmithError(f"expected {np.shape(scores)[1]} weights >= 0, one above 0, got {list(weights)}")
    return int(np.argmax(np.asarray(scores) @ (r / np.linalg.norm(r))))


def shares(scores: Array) -> Array:
    """Scores as shares of their range: [n, k], 0 the least and 1 the most of each; 1 where all are equal."""
    scores = np.asarray(scores, np.float64)
    low, high = scores.min(0), scores.max(0)
    return np.where(high > low, (scores - low) / np.where(high > low, high - low, 1.0), 1.0)


def preferences(words: str, names: Sequence[str]) -> list[float]:
    """Read "math=2,code=1" as a weight for each score; those without one have 0."""
    found: Mapping[str, float] = dict(_weight(word, names) for word in words.split(",") if word.strip())
    return [found.get(name, 0.0) for name in names]


def _weight(word: str, names: Sequence[str]) -> tuple[str, float]:
    name, _, value = (part.strip() for part in word.partition("="))
    if name not in names:
        raise WeightsmithError(f"unknown score {name!r}{did_you_mean(name, names)}")
    try:
        weight = float(value)
    except ValueError:
        raise WeightsmithError(f"the weight of {name} is {value!r}, not a number; write {name}=2") from None
    return name, weight
