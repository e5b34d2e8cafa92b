"""Quadratic surrogates of metrics: what evaluating some merges says about all others.

Source: "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (Li et al., ICLR
2025).  A metric M of theta_0 + sum_i c_i tau_i is, to second order around theta_0, a quadratic of c; a link keeps its
range: M(c) ~ link(sum_i a_ii c_i^2 + sum_{i<j} a_ij c_i c_j + sum_i b_i c_i + e).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.core.errors import WeightsmithError, did_you_mean

__all__ = ["FOLDS", "LINKS", "Link", "Surrogate", "design", "fit", "unknowns"]

Array = NDArray[np.float64]

EDGE = 1e-3
"""Metrics closer to the end of a link's range are moved here before its inverse is taken: that of 0 is infinite."""

RIDGE = 1e-6
"""Of the mean square of the columns; only where there are fewer than two points for each unknown."""

FOLDS = 5
"""Of the points that are left out in turn, to tell how far predictions are off."""


@dataclass(frozen=True)
class Link:
    """Maps any number into a metric's range (low, high)."""

    apply: Callable[[Array], Array]
    slope: Callable[[Array], Array]  # its derivative
    inverse: Callable[[Array], Array]
    low: float
    high: float
    hint: str = ""


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))  # does not overflow


LINKS: Mapping[str, Link] = {
    "sigmoid": Link(
        _sigmoid,
        lambda x: _sigmoid(x) * _sigmoid(-x),
        lambda y: np.log(y / (1 - y)),
        0,
        1,
        "; divide percentages by 100",
    ),
    "softplus": Link(lambda x: np.logaddexp(0, x), _sigmoid, lambda y: y + np.log(-np.expm1(-y)), 0, math.inf),
    "identity": Link(lambda x: x, np.ones_like, lambda y: y, -math.inf, math.inf),
}
"""sigmoid for accuracies (0 to 1), softplus for losses (above 0), identity for all else."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """One metric as a function of the coefficients.

    coefficients  float64 [P]: of c_i^2, of c_i c_j with i < j row by row, of c_i, and the constant
    error         root mean square error of predictions of points that were left out of the fit
    converged     False where the fit after the link did not converge and that before it is used
    """

    link: str
    coefficients: Array
    error: float = math.nan
    converged: bool = True

    def __call__(self, points: Array) -> Array:
        """Predict the metric: [m, T] -> [m]."""
        return LINKS[self.link].apply(design(points) @ self.coefficients)


def unknowns(tasks: int) -> int:
    """Number of coefficients of a quadratic of so many variables: (T + 1)(T + 2) / 2."""
    return (tasks + 1) * (tasks + 2) // 2


def design(points: Array) -> Array:
    """The terms of the quadratic: [m, T] -> [m, P], columns in the order of `Surrogate.coefficients`."""
    points = np.asarray(points, np.float64)
    first, second = np.triu_indices(points.shape[1], 1)
    return np.concatenate([points**2, points[:, first] * points[:, second], points, np.ones((len(points), 1))], axis=1)


def fit(points: Array, metrics: Array, link: str = "sigmoid") -> Surrogate:
    """Fit a surrogate to one metric of some merges, by least squares after the link.

    points   [m, T] coefficient vectors; metrics: [m], in the link's range

    Levenberg-Marquardt from the linear fit before the link.  Raises WeightsmithError for fewer points than unknowns,
    points that leave some of them undetermined, and metrics that are not finite or outside the link's range.
    """
    points, metrics = np.asarray(points, np.float64), np.asarray(metrics, np.float64)
    _check(points, metrics, link)
    terms = design(points)
    coefficients, converged = _solve(terms, metrics, LINKS[link])
    return Surrogate(link, coefficients, _left_out(terms, metrics, LINKS[link]), converged)


def _check(points: Array, metrics: Array, link: str) -> None:
    if link not in LINKS:
        raise WeightsmithError(f"unknown link {link!r}{did_you_mean(link, LINKS)}")
    if points.ndim != 2 or metrics.shape != points.shape[:1]:
        raise WeightsmithError(
            f"expected points [m, tasks] and one metric for each, got {list(points.shape)} and {list(metrics.shape)}"
        )
    if not (np.isfinite(points).all() and np.isfinite(metrics).all()):
        raise WeightsmithError("a point or a metric is not a finite number")
    bounds = LINKS[link]
    if metrics.size and not (bounds.low <= metrics.min() and metrics.max() <= bounds.high):
        worst = metrics[(metrics < bounds.low) | (metrics > bounds.high)][0]
        raise WeightsmithError(
            f"a metric of {worst:g} is outside the range of {link}, {bounds.low:g} to {bounds.high:g}{bounds.hint}"
        )
    count, wanted = len(points), unknowns(points.shape[1])
    if count < wanted:
        raise WeightsmithError(
            f"{count} points are too few for {points.shape[1]} tasks; evaluate at least {wanted}, better {2 * wanted}"
        )
    if (rank := int(np.linalg.matrix_rank(design(points)))) < wanted:
        raise WeightsmithError(
            f"the points determine {rank} of {wanted} unknowns (some are equal, or lie on a line); spread them"
        )


def _solve(terms: Array, metrics: Array, link: Link) -> tuple[Array, bool]:
    from scipy.optimize import least_squares

    inside = np.clip(metrics, link.low + EDGE, link.high - EDGE)
    count, wanted = terms.shape
    # One more row for each unknown pulls it towards 0, where little data would let it go anywhere.
    weight = math.sqrt(RIDGE * float((terms**2).mean()) * count) if count < 2 * wanted else 0.0
    pulled = np.concatenate([terms, weight * np.eye(wanted)]) if weight else terms
    start = np.linalg.lstsq(pulled, np.concatenate([link.inverse(inside), np.zeros(len(pulled) - count)]), rcond=None)[
        0
    ]
    if link is LINKS["identity"]:
        return start, True

    def misfit(c: Array) -> Array:
        return np.concatenate([link.apply(terms @ c) - metrics, weight * c if weight else c[:0]])

    def slopes(c: Array) -> Array:
        return np.concatenate([link.slope(terms @ c)[:, None] * terms, pulled[count:]])

    found: Any = least_squares(misfit, start, slopes, method="lm", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=2000)
    return (found.x, True) if found.success and np.isfinite(found.x).all() else (start, False)


def _left_out(terms: Array, metrics: Array, link: Link) -> float:
    """Root mean square error over folds; NaN where a fold leaves too few points."""
    count, wanted = terms.shape
    squares: list[float] = []
    for fold in range(FOLDS):
        out = np.arange(count) % FOLDS == fold
        if not out.any():
            continue
        if np.linalg.matrix_rank(terms[~out]) < wanted:
            return math.nan
        coefficients, _ = _solve(terms[~out], metrics[~out], link)
        squares += ((link.apply(terms[out] @ coefficients) - metrics[out]) ** 2).tolist()
    return math.sqrt(sum(squares) / len(squares))
