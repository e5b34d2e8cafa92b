"""How long a plan takes, roughly: what its methods cost per parameter and expert, and the bytes it moves.

All figures are of one machine (docs/benchmarks.md): processor seconds of one core of an AMD EPYC, default parameters.
Other processors, other parameters (steps of an iteration, ranks) and busy neighbours change them by a small factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weightsmith.core.costs import Costs
from weightsmith.core.method import Filter, Scope, Stage
from weightsmith.core.task import Task, Way
from weightsmith.plan.costs import costs_of

__all__ = ["SIDE", "START", "estimate", "seconds_at_7b", "stage_seconds"]

SIDE = 768
"""Smaller side of the matrices that the costs of `cubic` methods are measured on."""

START, READ, WRITE = 1.0, 0.2, 0.8
"""Seconds to start (two more where torch is needed), per 10^9 bytes read, and per 10^9 bytes written and flushed
(the copies of docs/benchmarks.md)."""

SUM = 1.0
"""Of `seconds` of a filter: the weighted sum that it is measured with."""

AGAIN = 0.6
"""Of a filter whose cuts, factors or marks are known: the seconds of its work in the kernels once they are found."""

_7B = (7e9, 4096)
"""Parameters of a 7B language model, and the smaller side of most of its matrices."""


def estimate(tasks: Iterable[Task], experts: int, read: int, written: int) -> float | None:
    """Seconds of a run on one core of the reference machine; None if the time of a stage is not known.

    experts  how many models are merged
    read, written  bytes; downloads are not counted
    """
    total = START + (READ * read + WRITE * written) / 1e9
    for task in tasks:
        for at, stage in enumerate(task.pipeline.stages if task.pipeline is not None else ()):
            for parameters, side in _sizes(task):
                spent = stage_seconds(costs_of(stage), parameters, side)
                if spent is None:
                    return None
                again = _again(stage, task, spent - SUM * parameters / 1e9, parameters, experts)
                total += (spent + _repeats(task, at, experts) * again) * experts
    return total


def _again(stage: Stage, task: Task, own: float, parameters: float, experts: int) -> float:
    """Seconds of a filter's work for one expert when it is done again: what it has measured of a tensor is kept."""
    spec: Any = stage.fused(experts) if task.way is Way.KERNEL and isinstance(stage, Filter) else None
    known = spec is not None and spec.place == "before" and (spec.cut is not None or spec.values or spec.marks)
    return max(min(own, AGAIN * parameters / 1e9) if known else own, 0)


def _repeats(task: Task, at: int, experts: int) -> int:
    """How often a filter does its work again, for looks that later stages take at what it leaves.

    Within one tensor the kernels keep what was costly to find.
    """
    assert task.pipeline is not None
    if not isinstance(task.pipeline.stages[at], Filter):
        return 0
    later = [one for i, one in task.pipeline.passes(experts) if i > at]
    return sum(one.rounds for one in later if one.scope is Scope.MODEL or task.way is not Way.KERNEL)


def stage_seconds(costs: Costs, parameters: float, side: int) -> float | None:
    """Of one stage and one expert, on matrices of this smaller side; None if not known."""
    if costs.seconds is None:
        return None
    return costs.seconds * parameters / 1e9 * (side / SIDE if costs.cubic else 1.0)


def seconds_at_7b(stage: type[Stage]) -> float | None:
    """The same for a model of 7e9 parameters."""
    return stage_seconds(costs_of(stage), *_7B)


def _sizes(task: Task) -> Iterable[tuple[int, int]]:
    """Parameters and smaller side of every tensor of a task."""
    keys = task.keys if task.group else (task.key,)
    for key in keys:
        rows = key.rows if task.group else task.stop - task.start
        yield rows * key.row_numel, min(key.rows, key.row_numel)
