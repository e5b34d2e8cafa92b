"""From scores to the rows of the demo's tables.  Every formula stands here once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Reference:
    """What one seed's merges are measured against: scores of the base, and of each task's expert on its own task."""

    base: Scores
    expert: Scores
    higher_is_better: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.expert)

    def normalised(self, model: Scores) -> float:
        """Score as a share of the expert's own, mean over tasks; where lower is better, expert / model."""
        pairs = [(model[t], self.expert[t]) for t in self.tasks]
        return statistics.fmean(m / e if self.higher_is_better else e / m for m, e in pairs)

    def gain_kept(self, model: Scores) -> float:
        """(model - base) / (expert - base), mean over tasks: 0 is the base, 1 as good as every expert at home."""
        return statistics.fmean((model[t] - self.base[t]) / (self.expert[t] - self.base[t]) for t in self.tasks)

    def forgetting(self, model: Scores, guards: Sequence[str]) -> float:
        """How much worse than the base the model is.

        With guards (what the base did besides the tasks): the mean loss on them, negative where it got better.
        Without: the mean over all tasks, a task that got better counting as 0.
        """
        sign = 1 if self.higher_is_better else -1
        if guards:
            return statistics.fmean(sign * (self.base[g] - model[g]) for g in guards)
        return statistics.fmean(max(0.0, sign * (self.base[t] - model[t])) for t in self.tasks)

    def beats_base(self, model: Scores) -> bool:
        """Whether the mean score is better than the base's."""
        ahead = statistics.fmean(model[t] for t in self.tasks) - statistics.fmean(self.base[t] for t in self.tasks)
        return ahead > 0 if self.higher_is_better else ahead < 0


@dataclass(frozen=True)
class Row:
    """One line of a table: means over the seeds."""

    name: str
    kind: str  # base, expert, joint, merge
    chosen: str
    tasks: Mapping[str, float]
    score: float
    normalised: float
    gain_kept: float
    forgetting: float
    spread: float | None  # standard deviation of gain_kept over the seeds; None with one seed, and for the base
    verdict: str
    recipe: str  # path of the recipe file, for a merge


def row(
    name: str,
    kind: str,
    models: Sequence[Scores],
    references: Sequence[Reference],
    guards: Sequence[str],
    chosen: str = "",
    recipe: str = "",
) -> Row:
    """Mean one model's scores, a mapping per seed, over the seeds."""
    pairs = list(zip(models, references, strict=True))
    gains = [reference.gain_kept(model) for model, reference in pairs]
    tasks = {task: statistics.fmean(model[task] for model in models) for task in references[0].tasks}
    beaten = sum(reference.beats_base(model) for model, reference in pairs)
    return Row(
        name=name,
        kind=kind,
        chosen=chosen,
        tasks=tasks,
        score=statistics.fmean(tasks.values()),
        normalised=statistics.fmean(reference.normalised(model) for model, reference in pairs),
        gain_kept=statistics.fmean(gains),
        forgetting=statistics.fmean(reference.forgetting(model, guards) for model, reference in pairs),
        spread=statistics.stdev(gains) if len(gains) > 1 and kind != "base" else None,
        verdict="" if kind == "base" else verdict(beaten, len(pairs)),
        recipe=recipe,
    )


def verdict(beaten: int, seeds: int) -> str:
    """In words, whether the mean over the tasks is better than the base's."""
    if beaten == seeds:
        return "above base"
    if beaten == 0:
        return "below base"
    return f"below base in {seeds - beaten} of {seeds}"
