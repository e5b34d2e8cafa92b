"""A merge of a few rows, for what a plan can foretell: how long the merged change will be, what `auto` will come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.keys import Key
from weightsmith.core.problem import Code, Problem
from weightsmith.core.task import Task, Way
from weightsmith.engine.carry import carry_out
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import Block, Source, quick_rows
from weightsmith.io.read.views import View
from weightsmith.io.write.sink import Sink
from weightsmith.plan.cost import START, estimate
from weightsmith.plan.lengths import lengths
from weightsmith.plan.plan import Plan

__all__ = ["foretold"]

TENSORS, ENTRIES, SECONDS = 8, 1 << 17, 2.0
"""How many tensors of each kind of treatment are tried, about how many entries of each, and how long that may take in
all by the plan's own estimate: the number of tensors is halved until it does."""


def foretold(plan: Plan, inputs: Inputs) -> tuple[dict[str, str], list[Problem]]:
    """('length' -> how long the merged change will be, in words), and warnings; nothing where no sample can be had.

    Rows from the middle of some tensors are merged as if they were the model.  Spectra of fewer rows are flatter, and
    a cut over the model is one over the sample, so the figures are about right only.
    """
    tasks = _chosen(plan, inputs)
    if not tasks:
        return {}, []
    rows = {task.key.name: (task.start, task.stop) for task in tasks}
    cut = {name: _Rows(source, rows) for name, source in inputs.experts.items()}
    assert inputs.base is not None
    few = Inputs(_Rows(inputs.base, rows), cut)
    own = [_whole(task, few) for task in tasks]
    try:
        room = replace(plan.room, fit=None)
        small = replace(plan, tasks=tuple(own), keys=tuple(key for task in own for key in task.keys), room=room)
        records = carry_out(small, few, _Nowhere())
    except WeightsmithError:  # what is wrong with the inputs, the run itself will say
        return {}, []
    found = lengths(own, records)
    words = [f"about {one.times:.2g} times an expert's" for one in found]
    of = [f" ({one.pipeline.name})" if len(found) > 1 else "" for one in found]
    text = ", ".join(a + b for a, b in zip(words, of, strict=True))
    said = [*_autos(own, records), *(problem for one in found for problem in one.advice("will be about"))]
    return ({"length": f"the merged change {text} (in a sample)"} if text else {}), said


def _autos(tasks: Sequence[Task], records: Mapping[str, Any]) -> Iterator[Problem]:
    """What the factors that are auto come to in the sample."""
    found: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        for stage in task.pipeline.stages if task.pipeline is not None else ():
            factor = records[task.id].get("told", {}).get(f"auto.{stage.name}")
            name = next((p.name for p in stage.parameters() if p.name in ("lambda", "scaling")), "")
            if factor is not None:
                found.setdefault((stage.name, name), []).append(factor)
    for (stage_name, name), factors in found.items():
        low, high = (f"{end:.2g}" for end in (min(factors), max(factors)))
        text = low if low == high else f"{low} to {high}"
        yield Problem(Code.AUTO, stage_name, f"{stage_name}: {name} auto will come to about {text} (in a sample)")


def _chosen(plan: Plan, inputs: Inputs) -> list[Task]:
    """Some tasks of each pipeline, each cut to a range of rows in which some expert has changed something."""
    if inputs.base is None or len(inputs.experts) < 2:
        return []
    sources = [source for _, source in inputs.models]
    by_kind: dict[str, list[Task]] = {}
    for task in plan.tasks:
        known = task.pipeline is not None and task.pipeline.codec is None and not task.stats
        if known and task.way is not Way.GROUP and task.key.shape and task.start == 0:
            assert task.pipeline is not None
            if all(source.quick(task.key.name) for source in sources):
                by_kind.setdefault(task.pipeline.name, []).append(task)
    most = TENSORS
    while most:
        tried = [_shortened(task) for own in by_kind.values() for task in own[:: -(-len(own) // most)]]
        spent = estimate(tried, len(inputs.experts), 0, 0)
        if spent is None:
            return []
        if spent - START <= SECONDS:
            return [task for task in tried if _changed(task, inputs)]
        most //= 2
    return []


def _shortened(task: Task) -> Task:
    key = task.key
    rows = min(key.rows, max(1, ENTRIES // max(key.row_numel, 1)))
    start = (key.rows - rows) // 2
    return replace(task, start=start, stop=start + rows)


def _changed(task: Task, inputs: Inputs) -> bool:
    """Whether there is anything to merge; looked at without torch, which need not be loaded where there is not."""
    assert inputs.base is not None
    name, stop = task.key.name, min(task.stop, task.start + max(1, (1 << 14) // max(task.key.row_numel, 1)))
    old = quick_rows(inputs.base, name, task.start, stop)
    return any(not np.array_equal(old, quick_rows(s, name, task.start, stop)) for s in inputs.experts.values())


def _whole(task: Task, inputs: Inputs) -> Task:
    """The task of the cut tensor, all of it."""
    assert inputs.base is not None
    shape = inputs.base.key(task.key.name).shape
    key = Key(task.key.name, shape, task.key.dtype)
    return replace(task, keys=(key,), start=0, stop=shape[0], of=None)


class _Rows(View):
    """Some rows of some tensors, as if they were all: tensor -> (first, last)."""

    def __init__(self, source: Source, rows: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(source)
        self._rows = dict(rows)
        whole = {name: source.key(name) for name in rows}
        self.keys = {n: Key(n, (high - low, *whole[n].shape[1:]), whole[n].dtype) for n, (low, high) in rows.items()}
        self.aliases = {}

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        first, last = self._rows[name]
        stop = last if high is None else min(first + high, last)
        return self.source.block(name, first + low, stop, into)

    def prepare(self) -> None:
        """Nothing is fetched for a plan."""


class _Nowhere(Sink):
    """Lets go of what it is given."""

    def begin(self, keys: Sequence[Key]) -> None:
        """Nothing to lay out."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Nothing to keep."""
