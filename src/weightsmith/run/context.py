"""What all tasks of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from weightsmith.method import Pipeline
from weightsmith.ops.fused import Stored
from weightsmith.run.inputs import Inputs
from weightsmith.run.task import BLOCK, Task
from weightsmith.site import Summary

__all__ = ["Context", "Summaries", "share"]

Summaries = Mapping[int, Summary]


@dataclass(frozen=True)
class Context:
    """What all tasks of a run share.  Picklable if the sources and the sink are.

    summaries    pipeline -> stage index -> summary, from the model-wide measuring passes
    block        elements per block; does not change a byte of the result
    kept         stored rows that the next pass over the same tensor will want again
    """

    inputs: Inputs
    seed: int = 0
    device: str = "cpu"
    nonfinite: str = "refuse"
    block: int = BLOCK
    summaries: Mapping[Pipeline, Summaries] = field(default_factory=dict)
    kept: dict[tuple[str, int, int], Stored] = field(default_factory=dict)
    progress: Callable[[int], None] = lambda _: None


def share(task: Task, start: int, stop: int) -> int:
    """Output bytes that rows start..stop of a task stand for."""
    return task.nbytes * (stop - start) // max(task.stop - task.start, 1)
