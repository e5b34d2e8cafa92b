"""Measuring passes over a whole model, before its tasks are carried out.

Tensors whose pipelines have the same model-wide passes are measured together even if parameters differ between them
(a ramp over depth, say) or the stages around (vectors beside the matrices of a spectral method, say): "the largest
20% of all changes" means all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from weightsmith.core.method import Pipeline
from weightsmith.core.pass_ import Pass, Rows, Scope, fold
from weightsmith.core.task import Task
from weightsmith.devices.place import CPU, Place
from weightsmith.engine.context import Context, Results
from weightsmith.engine.execute import look_at
from weightsmith.engine.lanes import Lanes
from weightsmith.engine.passes import Target
from weightsmith.engine.runner import Runner

__all__ = ["Bundle", "measure_model", "measure_models", "side_by_side"]

Bundle = tuple[tuple[int, Task], ...]
"""Tasks of several jobs (by number) over the same rows."""
Targets = Mapping[Pipeline, Target]


def side_by_side(tasks: Sequence[Sequence[Task]]) -> list[Bundle]:
    """Bring the tasks of all jobs that have the same id together, in the order of the first job."""
    found: dict[str, list[tuple[int, Task]]] = {}
    for i, of_job in enumerate(tasks):
        for task in of_job:
            found.setdefault(task.id, []).append((i, task))
    return [tuple(bundle) for bundle in found.values()]


def measure_model(tasks: Iterable[Task], context: Context, runner: Runner) -> Mapping[Pipeline, Results]:
    """The results of all model-wide passes of some tasks, by pipeline."""
    return measure_models([tasks], [context], runner)[0]


def measure_models(
    tasks: Sequence[Iterable[Task]], contexts: Sequence[Context], runner: Runner, lanes: Lanes | None = None
) -> list[Mapping[Pipeline, Results]]:
    """`measure_model` for several jobs, whose n-th looks go on side by side."""
    jobs = [_families(of_job, len(c.inputs.experts)) for of_job, c in zip(tasks, contexts, strict=True)]
    while any(current := [next((one for one in families if one.looks), None) for families in jobs]):
        bundles = side_by_side([() if family is None else family.members for family in current])
        # Totals stay here: only what a look needs goes along with the function.
        targets = [{} if family is None else family.targets for family in current]
        observe = partial(_observe, targets=targets, contexts=contexts, lanes=lanes)
        for bundle, found in zip(bundles, runner.map(observe, bundles), strict=True):
            for (i, _), state in zip(bundle, found, strict=True):
                current[i].add(state)  # type: ignore[union-attr]
        for family in current:
            if family is not None:
                family.end()
    return [{p: found for family in families for p, found in family.found.items()} for families in jobs]


def _observe(
    bundle: Bundle, targets: Sequence[Targets], contexts: Sequence[Context], lanes: Lanes | None
) -> list[Mapping[str, Any]]:
    def work(place: Place) -> list[Mapping[str, Any]]:
        wanted = [(task, replace(contexts[i], place=place), targets[i][task.pipeline]) for i, task in bundle
                  if task.pipeline is not None]  # fmt: skip
        return look_at(wanted)

    return work(CPU) if lanes is None else lanes.do([task for _, task in bundle], work)


class _Family:
    """Tensors that are measured together: their pipelines have passes of the same kinds.

    looks  pipeline -> its next look; empty when all are taken
    found  pipeline -> results so far
    """

    def __init__(self, tasks: Sequence[Task], count: int) -> None:
        self._tasks = tasks
        pipelines = dict.fromkeys(task.pipeline for task in tasks if task.pipeline is not None)
        self._passes = {p: [(i, one) for i, one in p.passes(count) if one.scope is Scope.MODEL] for p in pipelines}
        self.found: dict[Pipeline, dict[int, dict[Pass[Any], Any]]] = {p: {} for p in pipelines}
        self._place, self._total = -1, dict[str, Any]()
        self.looks: dict[Pipeline, Pass[Any]] = {}
        self._next()

    @property
    def members(self) -> list[Task]:
        """The tasks that have a look to take."""
        return [task for task in self._tasks if task.pipeline in self.looks]

    @property
    def targets(self) -> Targets:
        return {p: Target(self._passes[p][self._place][0], look, self.found[p]) for p, look in self.looks.items()}

    def add(self, state: Mapping[str, Any]) -> None:
        """Add what was seen of one tensor, in the order of the tasks."""
        if any(isinstance(value, Rows) for value in state.values()):
            names = {pipeline.name for pipeline in self.looks}
            raise TypeError(f"{', '.join(names)}: per-row values have no meaning over the whole model")
        self._total = fold([self._total, state])

    def end(self) -> None:
        """Go on to the next look, or to the next pass."""
        again: dict[Pipeline, Pass[Any]] = {}
        for pipeline, look in self.looks.items() if self._total else ():
            index, asked = self._passes[pipeline][self._place]
            found = look.end(self._total)
            if isinstance(found, Pass):
                again[pipeline] = found
            else:
                self.found[pipeline].setdefault(index, {})[asked] = found
        self.looks, self._total = again, {}
        if not again:
            self._next()

    def _next(self) -> None:
        self._place += 1
        self.looks = {p: passes[self._place][1] for p, passes in self._passes.items() if self._place < len(passes)}


def _families(tasks: Iterable[Task], count: int) -> list[_Family]:
    found: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        passes = task.pipeline.passes(count) if task.pipeline is not None else ()
        if task.pipeline is not None and any(one.scope is Scope.MODEL for _, one in passes):
            wide = {i for i, one in passes if one.scope is Scope.MODEL}
            kinds = [type(stage) if i in wide else None for i, stage in enumerate(task.pipeline.stages)]
            found.setdefault((*kinds, *((i, type(one)) for i, one in passes)), []).append(task)
    return [_Family(members, count) for members in found.values()]
