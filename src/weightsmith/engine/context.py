"""What all tasks of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.method import Found, Pass, Pipeline
from weightsmith.core.task import Task
from weightsmith.devices.place import CPU, Place
from weightsmith.inputs.opened import Inputs
from weightsmith.io.write.aside import Aside

__all__ = ["Context", "Results", "share"]

Results = Mapping[int, Found]
"""Stage index -> results of its passes."""


def _nothing(count: int) -> None:
    """Nobody watches (and, unlike a lambda, this can be pickled)."""


@dataclass(frozen=True)
class Context:
    """What all tasks of a run share.  Picklable if the sources and the sink are.

    found        pipeline -> results of its passes over the whole model
    place        where the arithmetic happens; replaced for every task, or group of tasks
    block        elements per block of a merge, default as the place says; does not change a byte of the result
    known        (task, pipeline, stage, pass) -> its result on one tensor, kept between looks over the whole model
    marks        what filters keep, likewise; None: it is found again
    """

    inputs: Inputs
    seed: int = 0
    place: Place = CPU
    nonfinite: str = "refuse"
    block: int | None = None
    found: Mapping[Pipeline, Results] = field(default_factory=dict)
    progress: Callable[[int], None] = _nothing
    known: dict[tuple[str, Pipeline, int, Pass[Any]], Any] = field(default_factory=dict)
    marks: Aside | None = None

    @property
    def measured(self) -> int:
        """Elements per block of a measuring pass, which is no setting: what is added up there has its order."""
        return self.place.measured(len(self.inputs.models))

    @property
    def merged(self) -> int:
        """Elements per block of a merge."""
        return self.block or self.place.block or self.measured


def share(task: Task, start: int, stop: int) -> int:
    """Output bytes that rows start..stop of a task stand for."""
    return task.nbytes * (stop - start) // max(task.stop - task.start, 1)
