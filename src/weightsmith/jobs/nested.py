"""A merge as a Source: nested recipes need no files between them.

`inputs` opens what a recipe names, but knows nothing of merging: the class for nested recipes is handed to it here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith.core.keys import DTYPES, Key
from weightsmith.core.settings import cores
from weightsmith.core.task import Task
from weightsmith.engine.carry import context_of, refuse_unequal
from weightsmith.engine.context import Context
from weightsmith.engine.execute import Variant, execute
from weightsmith.engine.model import measure_model
from weightsmith.engine.runner import SerialRunner
from weightsmith.inputs import opened
from weightsmith.inputs.opened import Inputs
from weightsmith.io.package.companions import with_dtype
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.source import Bits, Cost, Source
from weightsmith.io.write.sink import Sink
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import Recipe

__all__ = ["RecipeSource", "open_inputs"]

_OF_THIS_PROCESS = ("_lock", "_first", "_working", "_context", "_done")

KEEP = 4
"""Finished parts kept, beside one for each core: whoever reads row by row asks for the same part many times."""


def open_inputs(recipe: Recipe, given: Mapping[str, Source] | None = None) -> Inputs:
    """Open every input of a recipe, nested recipes too; see `inputs.opened.open_inputs`."""
    return opened.open_inputs(recipe, RecipeSource, given)


class RecipeSource(Source):
    """The result of a recipe, computed part by part as it is read; the same bytes as merging to disk first."""

    def __init__(self, recipe: Recipe, inputs: Inputs, label: str = "nested recipe") -> None:
        self.recipe = recipe
        self._inputs = inputs
        self._plan: Plan = make_plan(recipe, sources=self._inputs, threads=1)
        self.keys = {key.name: key for key in self._plan.keys}
        reference = self._inputs.models[0][1]
        self.aliases = reference.aliases
        text, dtype = config_of(reference), recipe.output.dtype
        self.origin = replace(
            reference.origin,
            label=label,
            locations=inputs.locations(),
            config=text if text is None or dtype is None else with_dtype(text, dtype),
            checkpoint=None,
            remarks=(),
            made_of=tuple(source.origin for _, source in inputs.models),
            cost=Cost(seconds=self._plan.seconds or 0.0),
        )
        self._tasks: dict[str, list[Task]] = {}
        for task in self._plan.tasks:
            for key in task.keys:
                self._tasks.setdefault(key.name, []).append(task)
        self._reset()

    def _reset(self) -> None:
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._working: dict[str, threading.Lock] = {}
        self._context: Context | None = None
        self._done: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _OF_THIS_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key = self.key(name)
        if not key.shape:
            return Bits(self._part(self._tasks[key.name][0])[key.name], key.dtype)
        stop = key.rows if high is None else high
        pieces = []
        for task in self._tasks[key.name]:
            begin, end = (0, key.rows) if task.group else (task.start, task.stop)
            first, last = max(begin, low), min(end, stop)
            if first < last:
                pieces.append(self._part(task)[key.name][first - begin : last - begin])
        if not pieces:
            pieces = [_empty(key, 0)]
        return Bits(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json"), "inputs": self._inputs.fingerprints()}

    def read_cost(self, name: str) -> float:
        """The nested merge's own working memory, per byte of what is read from it."""
        key = self.key(name)
        return max((t.peak for t in self._tasks[key.name]), default=0) / max(4 * key.numel, 1)

    def _part(self, task: Task) -> dict[str, np.ndarray]:
        """The finished bits of one task's tensors; two readers of one part: the second waits and finds it done."""
        with self._lock:
            working = self._working.setdefault(task.id, threading.Lock())
        with working:
            with self._lock:
                if task.id in self._done:
                    self._done.move_to_end(task.id)
                    return self._done[task.id]
            sink = _PartSink(task)
            execute([Variant(task, self._ready(), sink)])
            with self._lock:
                self._done[task.id] = sink.arrays
                while len(self._done) > KEEP + cores():  # every thread reads a part of its own
                    self._done.popitem(last=False)
            return sink.arrays

    def _ready(self) -> Context:
        with self._first:
            if self._context is None:
                refuse_unequal((task, self._inputs) for task in self._plan.tasks)
                context = context_of(self._plan, self._inputs)
                found = measure_model(self._plan.tasks, context, SerialRunner())
                self._context = replace(context, found=found)
            return self._context


class _PartSink(Sink):
    """Collects the rows that one task writes."""

    def __init__(self, task: Task) -> None:
        self._start = 0 if task.group else task.start
        rows = None if task.group else task.stop - task.start
        self.arrays = {key.name: _empty(key, rows) for key in task.keys}

    def begin(self, keys: Any) -> None:
        """Nothing to lay out."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        target = self.arrays[name]
        if target.ndim:
            target[start - self._start : start - self._start + bits.shape[0]] = bits
        else:
            target[...] = bits


def _empty(key: Key, rows: int | None) -> np.ndarray:
    shape = (rows if rows is not None else key.rows, *key.shape[1:]) if key.shape else ()
    return np.empty(shape, f"u{DTYPES[key.dtype].itemsize}")
