"""How long a merged change is beside the experts' own, and which factor to try where it is far from what suits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.core.method import Pipeline, Stage
from weightsmith.core.problem import Code, Problem
from weightsmith.core.task import Task
from weightsmith.ops.length import AUTO, fitted

__all__ = ["Length", "lengths"]

ALIKE, APART, SHORT = 1.5, 2.0, 0.3
"""How many times what suits a merged change may be before something is said of it: sums of 8 and 9 experts were best at
0.7 to 1.4 times an expert's length, and far below their base at 2.9; methods that keep experts apart bear more
(docs/study.md).  So short: only where there is a factor to raise, for a mean is short by nature; half as long
costs a point or two."""

MINOR = 0.2
"""Share of all merged entries below which nothing is said of what merges them: vectors beside a method's matrices."""

FACTORS = ("lambda", "scaling")
"""What methods call the factor of the merged task vector."""


@dataclass(frozen=True)
class Length:
    """Of the tensors that one pipeline merges, as a sample of their rows says.

    times     how many times as long as a mean expert's change the merged one is
    suited    how many times that it is to be by the rule of `ops.length` for this kind of methods
    numel     how many entries it stands for
    """

    pipeline: Pipeline
    times: float
    suited: float
    numel: int
    alike: bool = True

    def advice(self, verb: str) -> Iterator[Problem]:
        """A line with what to try, where the length is far from what suits."""
        scaled = _factor(self.pipeline) if self.alike else None
        apart, ratio = self.pipeline.method.traits.apart, self.times / self.suited
        if not (ratio > (APART if apart else ALIKE) or (ratio < SHORT and scaled is not None)):
            return
        better = f"with which it is {self.suited:.2g} times as long" if apart else "with which it is as long"
        try_ = f"put {{scale: {{factor: {1 / ratio:.2g}}}}} after it, {better}"
        if scaled is not None:
            stage, name, value = scaled
            now = f"{value / ratio:.2g}" if isinstance(value, (int, float)) else f"{1 / ratio:.2g} times as large"
            words = next(parameter.options for parameter in stage.parameters() if parameter.name == name)
            try_ = f"try {name} {now}, {better}{f', or {name} auto' if AUTO in words else ''}"
        where = self.pipeline.name
        text = f"{where}: the merged change {verb} {self.times:.2g} times as long as an expert's (in a sample); {try_}"
        yield Problem(Code.LENGTH, where, text)


def lengths(tasks: Iterable[Task], records: Mapping[str, Any]) -> list[Length]:
    """One for every pipeline of a run that merges much, by name; records: task id -> what `engine.execute` returned."""
    found: dict[str, list[tuple[Task, list[float]]]] = {}
    every = 0
    for task in tasks:
        if task.pipeline is not None:
            every += _numel(task)
            if squares := records[task.id].get("length"):
                found.setdefault(task.pipeline.name, []).append((task, squares))
    out = []
    for own in found.values():
        merged, added, *experts = map(math.fsum, zip(*(squares for _, squares in own), strict=True))
        mean = math.fsum(square**0.5 for square in experts) / len(experts)
        numel = sum(_numel(task) for task, _ in own)
        if not mean or not merged or numel < MINOR * every:
            continue
        pipeline = own[0][0].pipeline
        assert pipeline is not None
        rule = added if pipeline.method.traits.apart else None
        # fitted() is the factor from a length to the one that suits; of length 1 it is that length.
        suited = min(fitted(1.0, [square / mean**2 for square in experts], rule and rule / mean**2), len(experts))
        alike = len({_factor_value(task.pipeline) for task, _ in own if task.pipeline is not None}) == 1
        out.append(Length(pipeline, merged**0.5 / mean, suited, numel, alike))
    return out


def _numel(task: Task) -> int:
    if task.group:
        return sum(key.numel for key in task.keys)
    return (task.stop - task.start) * task.key.row_numel


def _factor_value(pipeline: Pipeline) -> Any:
    found = _factor(pipeline)
    return None if found is None else found[2]


def _factor(pipeline: Pipeline) -> tuple[Stage, str, Any] | None:
    """(stage, name, value) of the last factor of the merged task vector that is a number."""
    stages = pipeline.stages[pipeline.stages.index(pipeline.method) :]
    for stage in reversed(stages):
        for parameter in stage.parameters():
            if parameter.name in FACTORS and getattr(stage, parameter.field) != AUTO:
                return stage, parameter.name, getattr(stage, parameter.field)
    return None
