"""Fronts of functions that cost nothing to evaluate, and where their evaluations are worth most (Bayesian MAP).

Source: "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (Li et al., ICLR
2025).  Its front search is NSGA-III over all of [-3, 3]; here an evolution with the same operators (simulated binary
crossover and polynomial mutation, eta 20) stays in the box that was sampled, and all that is not dominated is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from weightsmith.search.fronts import front

__all__ = ["angles", "bin_scores", "pareto", "spread_over", "vector"]

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

POPULATION, GENERATIONS, ETA, CROSSOVER, MUTATION = 100, 60, 20.0, 0.7, 0.3
ARCHIVE, CELLS = 300, 250


def pareto(functions: Sequence[Function], low: Array, high: Array, seed: int) -> tuple[Array, Array]:
    """The front of functions [m, T] -> [m], all maximised, over a box: points [n, T] and values [n, k]."""
    draw = np.random.default_rng(seed)
    size = len(low)

    def values(points: Array) -> Array:
        return np.stack([function(points) for function in functions], axis=1)

    points = low + draw.random((POPULATION * 10, size)) * (high - low)
    corners = np.array(np.meshgrid(*[(0.0, 1.0)] * size)).reshape(size, -1).T if size <= 8 else np.eye(size)
    points = np.concatenate([points, low + corners * (high - low)])
    found = values(points)
    for _ in range(GENERATIONS):
        keep = _thinned(found, front(found))
        parents, known = points[keep], found[keep]
        first, second = (parents[draw.integers(len(parents), size=POPULATION)] for _ in range(2))
        children = np.clip(_mutated(_crossed(first, second, draw), low, high, draw), low, high)
        points = np.concatenate([parents, children])
        found = np.concatenate([known, values(children)])
    keep = _thinned(found, front(found))
    return points[keep], found[keep]


def _thinned(values: Array, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
    """Of those that lie together one, at most `ARCHIVE` evenly along the first goal, and the best of every goal."""
    held = values[chosen]
    span = held.max(0) - held.min(0)
    cells = np.round((held - held.min(0)) / np.where(span > 0, span, 1.0) * CELLS)
    _, first = np.unique(cells, axis=0, return_index=True)  # sorted by the first goal
    if len(first) > ARCHIVE:
        first = first[np.linspace(0, len(first) - 1, ARCHIVE).astype(int)]
    kept: NDArray[np.intp] = chosen[np.unique(np.concatenate([first, held.argmax(0)]))]
    return kept


def _crossed(a: Array, b: Array, draw: np.random.Generator) -> Array:
    u = draw.random(a.shape)
    beta = np.where(u < 0.5, (2 * u) ** (1 / (ETA + 1)), (1 / (2 * (1 - u))) ** (1 / (ETA + 1)))
    child = 0.5 * ((1 + beta) * a + (1 - beta) * b)
    return np.where(draw.random((len(a), 1)) < CROSSOVER, child, a)


def _mutated(points: Array, low: Array, high: Array, draw: np.random.Generator) -> Array:
    u = draw.random(points.shape)
    delta = np.where(u < 0.5, (2 * u) ** (1 / (ETA + 1)) - 1, 1 - (2 * (1 - u)) ** (1 / (ETA + 1)))
    return points + np.where(draw.random(points.shape) < MUTATION, delta, 0.0) * (high - low)


def spread_over(values: Array, count: int) -> list[int]:
    """So many points of a front, far from each other: the best of each goal, then always the farthest one."""
    span = values.max(0) - values.min(0)
    scaled = (values - values.min(0)) / np.where(span > 0, span, 1.0)
    chosen = list(dict.fromkeys(int(i) for i in scaled.argmax(0)))[:count]
    while len(chosen) < min(count, len(values)):
        far = np.linalg.norm(scaled[:, None] - scaled[chosen][None], axis=2).min(1)
        far[chosen] = -1.0
        chosen.append(int(far.argmax()))
    return chosen


# --- spheres ---------------------------------------------------------------------------------------


def angles(points: Array) -> tuple[Array, Array]:
    """Hyperspherical angles [m, T - 1] and radii [m]: phi_i = arctan2 of the norm of what follows, and x_i."""
    tails = np.sqrt(np.cumsum(points[:, ::-1] ** 2, axis=1))[:, ::-1]
    phi = np.arctan2(tails[:, 1:], points[:, :-1])
    if points.shape[1] > 1:
        phi[:, -1] = np.arctan2(points[:, -1], points[:, -2])
    return phi, tails[:, 0]


def vector(phi: Array, radius: Array) -> Array:
    """The way back: [m, T - 1] and [m] -> [m, T]."""
    count, size = phi.shape[0], phi.shape[1] + 1
    found = np.empty((count, size))
    left = radius.astype(np.float64).copy()
    for i in range(size - 1):
        found[:, i] = left * np.cos(phi[:, i])
        left = left * np.sin(phi[:, i])
    found[:, -1] = left
    return found


def bin_scores(phi: Array, errors: Array, bins: int, weight: float, draw: np.random.Generator) -> Array:
    """A score for each bin of the angles' box [0, pi / 2]: mean squared error + weight * std of its mean.

    errors  [m], squared, of the points at `phi`.  The std is over 30 means that leave out a fifth.  Bins without a
    point have the largest score: nothing is known there (the authors' code never looks).
    """
    edges = np.clip((phi / (math.pi / 2) * bins).astype(int), 0, bins - 1)
    places = edges @ (bins ** np.arange(phi.shape[1])) if phi.shape[1] else np.zeros(len(phi), int)
    scores = np.full(bins ** phi.shape[1], -np.inf)
    for place in np.unique(places):
        mine = errors[places == place]
        kept = max(1, round(0.8 * len(mine)))
        means = [mine[draw.permutation(len(mine))[:kept]].mean() for _ in range(30)]
        scores[place] = mine.mean() + weight * float(np.std(means))
    scores[np.isneginf(scores)] = scores.max()
    return scores
