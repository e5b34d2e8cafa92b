"""From scores to figures: every formula of a study stands here once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["MIN_GAIN", "Reference", "Scores", "mean_over", "tau"]

Scores = Mapping[str, float]
"""Task or guard -> score."""

MIN_GAIN = 0.01
"""An expert that gains less than this share of its own score has nothing that could be kept: dividing by it would
turn rounding into percentages."""


@dataclass(frozen=True)
class Reference:
    """What merges are measured against: scores of the base, and of each expert on its own task."""

    base: Scores
    expert: Scores
    higher_is_better: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.expert)

    @property
    def _sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def gaining(self) -> tuple[str, ...]:
        """Tasks whose expert is better than the base by at least MIN_GAIN of its own score."""
        gains = {t: self._sign * (self.expert[t] - self.base[t]) for t in self.tasks}
        return tuple(t for t, gain in gains.items() if gain > 0 and gain >= MIN_GAIN * abs(self.expert[t]))

    def better(self, a: float, b: float) -> bool:
        """Whether score a is better than score b."""
        return self._sign * (a - b) > 0

    def score(self, model: Scores) -> float:
        """Mean over the tasks."""
        return statistics.fmean(model[t] for t in self.tasks)

    def normalised_by_task(self, model: Scores) -> dict[str, float]:
        """Task -> score as a share of the expert's own (expert / model where lower is better).

        A task is left out if the divisor is not above 0: of log-likelihoods the share would turn the order round.
        """
        pairs = {t: (model[t], self.expert[t]) if self.higher_is_better else (self.expert[t], model[t])
                 for t in self.tasks}  # fmt: skip
        return {t: a / b for t, (a, b) in pairs.items() if b > 0}

    def normalised(self, model: Scores) -> float | None:
        """Mean of `normalised_by_task`; None if no task has one."""
        return mean_over(self.normalised_by_task(model).values())

    def gain_kept(self, model: Scores) -> float | None:
        """(model - base) / (expert - base), mean over the tasks whose expert gained; 0 is the base, 1 every expert."""
        return mean_over((model[t] - self.base[t]) / (self.expert[t] - self.base[t]) for t in self.gaining())

    def forgetting(self, model: Scores, guards: Sequence[str]) -> float:
        """How much worse than the base the model is, in points of the score.

        With guards (what the base could do besides the tasks): the mean loss on them, negative where it got better.
        Without: the mean loss over the tasks, a task that got better counting as 0.
        """
        if guards:
            return statistics.fmean(self._sign * (self.base[g] - model[g]) for g in guards)
        return statistics.fmean(max(0.0, self._sign * (self.base[t] - model[t])) for t in self.tasks)


def mean_over(values: object) -> float | None:
    """Mean of some numbers; None if there are none."""
    found = list(values)  # type: ignore[call-overload]
    return statistics.fmean(found) if found else None


def tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-a of two lists of figures for the same things: (pairs ordered alike - unlike) / all pairs.

    A pair that is equal in either list counts for neither.  None for fewer than two things.
    """
    pairs = [(i, j) for j in range(len(first)) for i in range(j)]
    if not pairs:
        return None

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    return sum(sign(first[i] - first[j]) * sign(second[i] - second[j]) for i, j in pairs) / len(pairs)
