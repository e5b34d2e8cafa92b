"""Measuring passes over tensors, without a merge: what inspection, comparison and checks stand on.

norms = Norms()                                         # a frozen value, see `core.pass_.Pass`
found = stream(inputs, inputs.base.keys.values(), [norms])
found["model.norm.weight"][norms]                       # its typed result
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

from weightsmith.core.costs import Costs
from weightsmith.core.keys import Key
from weightsmith.core.method import BASE, Factored, Found, Grain, Method, Pipeline, Traits
from weightsmith.core.pass_ import Pass
from weightsmith.core.settings import DEFAULT, Settings, cores
from weightsmith.core.task import Task, Way
from weightsmith.devices.accelerator import accelerator_of
from weightsmith.devices.place import CPU, Plain
from weightsmith.engine.context import Context
from weightsmith.engine.passes import Chain, measure
from weightsmith.engine.runner import SerialRunner, ThreadRunner, one_thread_each
from weightsmith.engine.sites import Reader
from weightsmith.inputs.opened import Inputs

__all__ = ["each_tensor", "looking", "observe", "stream"]

R = TypeVar("R")


def stream(
    inputs: Inputs,
    keys: Iterable[Key],
    passes: Sequence[Pass[Any]],
    settings: Settings = DEFAULT,
    *,
    nonfinite: str = "refuse",
    seed: int = 0,
) -> dict[str, Found]:
    """Measure tensors one by one, in bounded memory: tensor -> pass -> result.

    A pass sees task vectors where the inputs have a base, and may use the results of those before it.  Results do
    not depend on the number of threads.

    Raises NumericError for a NaN or Inf, unless `nonfinite` is 'allow'.
    """
    context = looking(inputs, settings, nonfinite=nonfinite, seed=seed)
    return each_tensor(keys, partial(observe, passes=tuple(passes), context=context), settings)


def looking(inputs: Inputs, settings: Settings, *, nonfinite: str = "refuse", seed: int = 0) -> Context:
    """What `observe` needs: the inputs, and the device of the settings."""
    for _, source in inputs.models:
        source.prepare()
    wanted = accelerator_of(settings.device)
    place = CPU if wanted is None else Plain(wanted.devices()[0])
    return Context(inputs=inputs, place=place, nonfinite=nonfinite, seed=seed)


def each_tensor(keys: Iterable[Key], work: Callable[[Key], R], settings: Settings = DEFAULT) -> dict[str, R]:
    """Do some work on every tensor, on all cores or the threads of the settings; in the order of `keys`.

    `settings.progress` is told the entries done.
    """
    importlib.import_module("torch")  # once, before threads race for it
    wanted = list(keys)
    # The largest first: none of them is then left over at the end for one thread alone.
    order = sorted(wanted, key=lambda key: -key.numel)
    threads = settings.threads or cores()
    done, total, found = 0, sum(key.numel for key in wanted), dict[str, R]()
    with one_thread_each():
        runner = ThreadRunner(threads) if threads > 1 else SerialRunner()
        for key, result in zip(order, runner.map(work, order), strict=True):
            found[key.name] = result
            done += key.numel
            if settings.progress is not None:
                settings.progress(done, total)
    return {key.name: found[key.name] for key in wanted}


def observe(key: Key, passes: tuple[Pass[Any], ...], context: Context) -> Found:
    """The results of passes over one tensor."""
    factored, whole = any(one.factored for one in passes), any(one.whole for one in passes)
    kind = _Experts if context.inputs.base is None else _Products if factored else _Changes
    stage = kind(passes, whole or factored)
    way = Way.ROWS if stage.grain is Grain.ELEMENT else Way.WHOLE
    chain = Chain(Task(key.name, (key,), Pipeline((stage,)), stop=key.rows, way=way), context)
    measure([chain], Reader(), None)
    return chain.found.get(0, {})


SUMMED = Costs(scratch=2.0)
"""Of a stage that only measures: sums of what is read."""


@dataclass(frozen=True)
class _Looking(Method):
    """A stage that only measures."""

    asked: tuple[Pass[Any], ...]
    whole: bool = field(default=False)

    @property  # a constant of the others
    def grain(self) -> Grain:  # type: ignore[override]
        return Grain.TENSOR if self.whole else Grain.ELEMENT

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return self.asked


@dataclass(frozen=True)
class _Experts(_Looking):
    traits: ClassVar[Traits] = Traits("observe", costs=SUMMED)


@dataclass(frozen=True)
class _Changes(_Looking):
    traits: ClassVar[Traits] = Traits("observe", needs=(BASE,), costs=SUMMED)


@dataclass(frozen=True)
class _Products(_Looking, Factored):  # type: ignore[override]
    traits: ClassVar[Traits] = Traits("observe", needs=(BASE,), costs=SUMMED)
