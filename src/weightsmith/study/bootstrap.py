"""Paired bootstrap over examples: is one model better than another, or are they tied?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.study.scoring import domain_scores
from weightsmith.study.suite import Rule, Task

__all__ = ["DRAWS", "Interval", "Resampled", "resample"]

DRAWS = 10_000
_CHUNK = 500

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A difference with its 95% interval (percentiles of the bootstrap); `tied` where that holds 0."""

    difference: float
    low: float
    high: float

    @property
    def tied(self) -> bool:
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Resampled:
    """A suite's figure of every model under the same draws: [draws, models]."""

    models: tuple[str, ...]
    figures: Array
    points: Mapping[str, float]

    def versus(self, model: str, other: str) -> Interval:
        """model - other."""
        a, b = self.models.index(model), self.models.index(other)
        low, high = np.percentile(self.figures[:, a] - self.figures[:, b], [2.5, 97.5])
        return Interval(self.points[model] - self.points[other], float(low), float(high))


def resample(
    tasks: Sequence[Task],
    rule: Rule,
    reference: Mapping[str, float],
    scores: Mapping[str, Mapping[str, float]],
    examples: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Resampled:
    """Draw the examples of every task anew, the same ones for all models, and combine what comes out.

    reference   domain -> what its score is divided by, which stays as it is
    scores      model -> task -> raw score;  examples: model -> task -> score of each example, in one order.  A task of
                which a model has no examples keeps its score: what it adds to the uncertainty is not known
    """
    models = tuple(scores)
    draw = np.random.default_rng(seed)
    domains: dict[str, list[Array]] = {}
    for task in (task for task in tasks if task.role == "test"):
        rows = [examples[model].get(task.name) for model in models]
        if all(rows) and len({len(row) for row in rows if row}) == 1:
            raw = _means(np.array(rows, np.float64), draws, draw)
        else:
            raw = np.broadcast_to([scores[model][task.name] for model in models], (draws, len(models)))
        domains.setdefault(task.domain, []).append(_up(task, raw))
    means = {d: np.mean(parts, axis=0) for d, parts in domains.items() if reference[d] > 0}
    shares = {d: value / reference[d] for d, value in means.items()}
    figures = np.asarray(rule.combine(shares))
    points = {model: _point(tasks, rule, reference, scores[model]) for model in models}
    return Resampled(models, figures, points)


def _means(values: Array, draws: int, draw: np.random.Generator) -> Array:
    """[models, examples] -> means of `draws` resamples, [draws, models]."""
    count = values.shape[1]
    parts = []
    for start in range(0, draws, _CHUNK):
        times = draw.multinomial(count, np.full(count, 1 / count), size=min(_CHUNK, draws - start))
        parts.append(times @ values.T / count)
    return np.concatenate(parts)


def _up(task: Task, raw: Array) -> Array:
    return np.vectorize(task.up, otypes=[np.float64])(raw) if task.direction != "higher" else np.asarray(raw)


def _point(tasks: Sequence[Task], rule: Rule, reference: Mapping[str, float], scores: Mapping[str, float]) -> float:
    found = domain_scores(tasks, scores)
    return float(rule.combine({d: value / reference[d] for d, value in found.items() if reference[d] > 0}))
