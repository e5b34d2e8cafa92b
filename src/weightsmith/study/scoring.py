"""From scores of tasks to the figures of a suite's table: every formula stands here once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.study.figures import MIN_GAIN
from weightsmith.study.suite import PER_UNIT, Rule, Task

__all__ = ["Figures", "Scale", "domain_scores", "forgetting", "wilson"]

Scores = Mapping[str, float]
"""Task -> raw score."""


def domain_scores(tasks: Sequence[Task], scores: Scores) -> dict[str, float]:
    """Domain -> mean of its test tasks, each so that higher is better."""
    by_domain: dict[str, list[float]] = {}
    for task in tasks:
        if task.role == "test":
            by_domain.setdefault(task.domain, []).append(task.up(scores[task.name]))
    return {domain: statistics.fmean(values) for domain, values in by_domain.items()}


@dataclass(frozen=True)
class Figures:
    """One model's row.

    domains      domain -> score, higher is better
    normalised   domain -> share of what the rule divides by; a domain is left out if that is 0 or less
    gain         domain -> (model - base) / (reference - base), left out where the reference hardly gains
    figure       the rule's combination of `normalised`; None without any
    mean         mean of `domains`;  worst: the domain with the least normalised score
    forgetting   mean over the guards of score - base's;  retention: of score / base's
    """

    domains: Mapping[str, float]
    normalised: Mapping[str, float]
    gain: Mapping[str, float]
    figure: float | None
    mean: float
    worst: str | None
    forgetting: float | None
    retention: float | None


@dataclass(frozen=True)
class Scale:
    """What models are measured against: the scores of the base and of all experts.

    homes   domain -> the expert at home there, for a rule against experts
    """

    tasks: Sequence[Task]
    rule: Rule
    base: Scores
    experts: Mapping[str, Scores]
    homes: Mapping[str, str] = field(default_factory=dict)

    def reference(self) -> dict[str, float]:
        """Domain -> what its score is divided by."""
        base = domain_scores(self.tasks, self.base)
        experts = {name: domain_scores(self.tasks, scores) for name, scores in self.experts.items()}
        if self.rule.against == "base":
            return base
        if self.rule.against == "best":
            return {domain: max(found[domain] for found in experts.values()) for domain in base}
        return {domain: experts[self.homes[domain]][domain] for domain in base}

    def figures(self, scores: Scores) -> Figures:
        """The figures of one model."""
        domains, base, reference = (
            domain_scores(self.tasks, scores),
            domain_scores(self.tasks, self.base),
            self.reference(),
        )
        normalised = {d: value / reference[d] for d, value in domains.items() if reference[d] > 0}
        gaining = [d for d in domains if reference[d] - base[d] >= self._least_gain(d, reference[d])]
        lost, kept = forgetting(self.tasks, scores, self.base)
        return Figures(
            domains=domains,
            normalised=normalised,
            gain={d: (domains[d] - base[d]) / (reference[d] - base[d]) for d in gaining},
            figure=self.rule.combine(normalised) if normalised else None,
            mean=statistics.fmean(domains.values()),
            worst=min(normalised, key=normalised.__getitem__) if normalised else None,
            forgetting=lost,
            retention=kept,
        )

    def _least_gain(self, domain: str, reference: float) -> float:
        """1% of the range: of rates that is 0.01, of amounts 1% of the reference."""
        free = any(task.domain == domain and task.direction == PER_UNIT for task in self.tasks)
        return max(MIN_GAIN * (abs(reference) if free else 1.0), 1e-12)

    def worse_than_base(self) -> dict[str, tuple[str, ...]]:
        """Expert -> domains of its own in which the base is better."""
        base = domain_scores(self.tasks, self.base)
        found: dict[str, tuple[str, ...]] = {}
        for name, scores in self.experts.items():
            own = domain_scores(self.tasks, scores)
            home = [d for d in own if self.homes.get(d) == name]
            if lost := tuple(d for d in home if own[d] < base[d]):
                found[name] = lost
        return found


def forgetting(tasks: Sequence[Task], scores: Scores, base: Scores) -> tuple[float | None, float | None]:
    """(mean of score - base's, mean of score / base's) over the guards, higher is better; None without any."""
    guards = [task for task in tasks if task.role == "guard"]
    pairs = [(task.up(scores[task.name]), task.up(base[task.name])) for task in guards]
    shares = [model / at for model, at in pairs if at > 0]
    lost = statistics.fmean(model - at for model, at in pairs) if pairs else None
    return lost, statistics.fmean(shares) if shares else None


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval of a share (1927); z of 95%."""
    if not count:
        return 0.0, 1.0
    p = hits / count
    middle, half = p + z * z / (2 * count), z * ((p * (1 - p) + z * z / (4 * count)) / count) ** 0.5
    divisor = 1 + z * z / count
    return max((middle - half) / divisor, 0.0), min((middle + half) / divisor, 1.0)
