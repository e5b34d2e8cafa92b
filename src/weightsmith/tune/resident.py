"""One module whose weights are a recipe's result: put there by the streaming merge, and read back as gradients.

Forward: the tasks that depend on the numbers are carried out into the module's parameters, in place.  Backward: a hook
contracts the gradient of each parameter with the merge's derivative as soon as it is there, and frees it.  So memory is
one model, its largest gradient, the activations, and a few blocks of the inputs, whatever the number of experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith.core.errors import PlanError
from weightsmith.core.method import Pipeline
from weightsmith.core.parameter import Traced, opened, traced
from weightsmith.core.task import Task
from weightsmith.engine.carry import context_of, refuse_unequal
from weightsmith.engine.context import Context, Results
from weightsmith.engine.execute import Variant, execute
from weightsmith.engine.gradient import Pullback, tensors_of
from weightsmith.engine.model import measure_model
from weightsmith.engine.runner import SerialRunner, ThreadRunner, one_thread_each
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import bits_to_tensor
from weightsmith.io.write.sink import Sink
from weightsmith.plan.plan import Plan

__all__ = ["Resident"]


class Resident:
    """A module under a plan.

    places  tensor name (of the checkpoint) -> the module's parameter; all others stay as they are in the module

    The module is put to eval mode; what is not learned asks for no gradient.
    """

    def __init__(
        self, module: nn.Module, places: Mapping[str, Tensor], plan: Plan, inputs: Inputs, threads: int
    ) -> None:
        self.module, self.places, self.plan, self.inputs, self.threads = module, places, plan, inputs, threads
        refuse_unequal((task, inputs) for task in plan.tasks)
        self._context = context_of(plan, inputs)
        self._tasks = [task for task in plan.tasks if tensors_of([task])]
        self.tensors = tensors_of(self._tasks)
        self._sink = _Into(places)
        lost = [task.key.name for task in self._tasks if task.key.name not in places]
        if lost:
            raise PlanError(
                [
                    f"{name}: the merge makes it, but the module has no parameter for it; add it to exclude"
                    for name in lost
                ]
            )
        self._asked, self._results = "", list[Results]()
        self._sink.begin(plan.keys)
        self.begin()
        free = {id(places[name]) for name in {task.key.name for task in self._tasks}}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in free)
        module.eval()
        self.pullback: Pullback | None = None
        self._found: dict[Tensor, Tensor] = {}

    def begin(self) -> None:
        """Put what does not depend on the numbers into the module."""
        rest = [task for task in self.plan.tasks if not tensors_of([task]) and task.key.name in self.places]
        self._fill(rest, replace(self._context, found=measure_model(rest, self._context, SerialRunner())))

    def refresh(self) -> None:
        """Merge with the numbers as they are now, into the module.

        What is measured over the whole model is measured anew where it depends on the numbers.
        """
        self._tasks = [_renewed(task) for task in self._tasks]
        self._context = replace(self._context, found=self._measure())
        self._fill(self._tasks, self._context)
        self.pullback = Pullback(self._tasks, self.plan.keys, self._context)

    def _measure(self) -> Mapping[Pipeline, Results]:
        count = len(self.inputs.experts)
        pipelines = [p for p in dict.fromkeys(task.pipeline for task in self._tasks) if p is not None]
        # In words, which hold the numbers' values: traced numbers are equal as long as their tensors are the same.
        asked = repr([p.passes(count) for p in pipelines])
        if asked == self._asked and not any(_moving(p, count) for p in pipelines):
            return dict(zip(pipelines, self._results, strict=True))
        found = measure_model(self._tasks, self._context, SerialRunner())
        self._asked, self._results = asked, [found.get(p, {}) for p in pipelines]
        return found

    def _fill(self, tasks: Sequence[Task], context: Context) -> None:
        def work(task: Task) -> None:
            execute([_Filling(task, context, self._sink)])

        with torch.no_grad(), one_thread_each():
            runner = ThreadRunner(self.threads) if self.threads > 1 else SerialRunner()
            for _ in runner.map(work, tasks):
                pass

    @contextlib.contextmanager
    def gathering(self, hold: bool = False) -> Iterator[dict[Tensor, Tensor]]:
        """Within: what backward finds of the module's weights is contracted, added up and freed; with `hold` behind it.

        Held gradients take the memory of one more module, and are contracted once for all backward passes.
        """
        assert self.pullback is not None
        self._found = {tensor: torch.zeros_like(tensor) for tensor in self.tensors}
        names = {id(self.places[name]): name for name in self.pullback.names}
        handles = []
        for parameter in self.module.parameters():
            if (name := names.get(id(parameter))) is not None and not hold:
                hooked: Any = parameter  # torch has no types for it
                handles.append(hooked.register_post_accumulate_grad_hook(self._hook(name)))
        try:
            yield self._found
            for parameter in self.module.parameters() if hold else ():
                if parameter.grad is not None and id(parameter) in names:
                    self._hook(names[id(parameter)])(parameter)
        finally:
            for parameter in self.module.parameters() if hold else ():
                parameter.grad = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def contract(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            assert self.pullback is not None
            for tensor, value in self.pullback.one(name, gradient).items():
                self._found[tensor] += value

        return contract


class _Filling(Variant):
    """A task whose rows go into memory: no checksums."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        assert self.sink is not None
        self.sink.write(name, start, bits)


class _Into(Sink):
    """Puts rows into tensors, cast to their dtype."""

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        self._places = places

    def begin(self, keys: Any) -> None:
        """Everything is there."""
        self._dtypes = {key.name: key.dtype for key in keys}

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        target = self._places[name].data
        rows = bits_to_tensor(bits, self._dtypes[name])
        if target.ndim:
            target[start : start + rows.shape[0]] = rows.to(target.device, target.dtype)
        else:
            target.copy_(rows)


def _renewed(task: Task) -> Task:
    """The task with the numbers that its tensors hold now."""
    assert task.pipeline is not None
    now = (opened(stage, lambda v: Traced(v.tensor) if isinstance(v, Traced) else v) for stage in task.pipeline.stages)
    return replace(task, pipeline=Pipeline(tuple(now)))


def _moving(pipeline: Pipeline, count: int) -> bool:
    """Whether something is measured behind a stage that is learned."""
    return any(traced(stage) for index, _ in pipeline.passes(count) for stage in pipeline.stages[:index])
