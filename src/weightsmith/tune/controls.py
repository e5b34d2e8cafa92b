"""What a tuning should be better than, on the same validation data: learned numbers often are not.

untuned   the recipe with the numbers at their start
searched  task arithmetic whose one lambda is the best of a grid on these data
random    the same tuning of random changes: each task vector with its signs drawn anew, so of the same norms

The loss is the tuning's own, with an interval by bootstrap over batches.  `searched` is chosen on the data that it is
measured with, as the tuned numbers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from weightsmith.io.read.source import Block, Source
from weightsmith.ops.noise import uniform_bits
from weightsmith.tune.descent import Descent
from weightsmith.tune.journal import Journal
from weightsmith.tune.resident import Resident
from weightsmith.tune.space import Free
from weightsmith.tune.tuner import Tuner
from weightsmith.tune.work import Work, prepared

__all__ = ["Control", "RandomSigns", "compare"]

GRID = tuple(round(0.1 * i, 1) for i in range(1, 11))
DRAWS = 1000


@dataclass(frozen=True)
class Control:
    """A name, the mean loss over tasks, and its 95% interval."""

    name: str
    loss: float
    low: float
    high: float


class RandomSigns(Source):
    """A model whose change from the base has its signs drawn at random: every magnitude, and so every norm, is kept."""

    def __init__(self, model: Source, base: Source, name: str, seed: int = 0) -> None:
        self.keys = {key: base.keys[key] for key in model.keys if key in base.keys}
        self.aliases, self.origin = base.aliases, replace(base.origin, label=f"random changes of {name}")
        self._model, self._base, self._name, self._seed = model, base, name, seed

    def computes(self, name: str) -> bool:
        return self.key(name).floating

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if not key.floating:
            return self._base.block(name, low, high, into)
        base = self._base.read(name, low, high).float()
        change = self._model.read(name, low, high).float() - base
        bits = uniform_bits(self._seed, key.name, self._name, "signs", low * key.row_numel, change.numel())
        signs = torch.from_numpy((bits & 1).astype(np.float32)).mul_(2).sub_(1).reshape(change.shape)
        return base + change * signs


def compare(tuner: Tuner, work: Work, given: Mapping[str, Any] | None, threads: int, every: int) -> tuple[Control, ...]:
    """Measure the tuned module as it is, and the controls; the module holds the tuned weights again afterwards."""
    setting, module = tuner.setting, tuner.resident.module
    found = [_measured("tuned", tuner)]
    learned = [raw.detach().clone() for raw in tuner.raw]
    tuner.start()
    found.append(_measured("untuned", tuner))
    base = work.inputs.base
    if base is None:  # there are no changes to scale or to draw
        tuner.put(learned)
        return tuple(found)

    plain = replace(setting, free={"lambda": Free(per="model", start=GRID[0], shared=True)},
                    method=("task_arithmetic",), descent=Descent(steps=0))  # fmt: skip
    grid = []
    one = _tuner(prepared(dict(work.tree), given, plain, module), tuner, plain, threads)
    for value in GRID:
        one.put([torch.full_like(raw, value) for raw in one.raw])
        grid.append(_measured(f"task arithmetic, lambda {value:g}", one))
    found.append(min(grid, key=lambda control: control.loss))

    models = {name: RandomSigns(model, base, name) for name, model in work.inputs.experts.items()}
    random = _tuner(prepared(dict(work.tree), {"base": base, **models}, setting, module), tuner, setting, threads)
    random.run(every=every)
    found.append(_measured("the same tuning of random changes", random))
    tuner.resident.begin()
    tuner.put(learned)
    return tuple(found)


def _tuner(work: Work, like: Tuner, setting: Any, threads: int) -> Tuner:
    resident = Resident(like.resident.module, work.places, work.plan, work.inputs, threads)
    return Tuner(setting, work.numbers, resident, like.data, Journal(None, ""))


def _measured(name: str, tuner: Tuner) -> Control:
    losses = [values for values in tuner.evaluate(tuner.data.validation).values() if values]
    return Control(name, float(np.mean([np.mean(values) for values in losses])), *_interval(losses))


def _interval(losses: Sequence[Sequence[float]]) -> tuple[float, float]:
    """2.5% and 97.5% of the mean over tasks of means, over draws of batches with replacement."""
    draw = np.random.Generator(np.random.PCG64(0))
    sums = np.zeros(DRAWS)
    for values in losses:
        array = np.asarray(values)
        sums += array[draw.integers(len(array), size=(DRAWS, len(array)))].mean(axis=1)
    low, high = np.quantile(sums / len(losses), [0.025, 0.975])
    return float(low), float(high)
