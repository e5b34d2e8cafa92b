"""The loop: refresh the module, sum the losses, contract the gradients, move the numbers, write the journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import NumericError
from weightsmith.tune.descent import Descent, restore, state_of
from weightsmith.tune.journal import Journal, State
from weightsmith.tune.objective import logits_of
from weightsmith.tune.resident import Resident
from weightsmith.tune.setting import Setting
from weightsmith.tune.space import Numbers

__all__ = ["Data", "Tuner"]

Function = Callable[[nn.Module, Any], Any]

SEEN = "validation "
"""Start of the columns with a task's measure."""

LOOKS = 8
"""Steps' batches from which a budget is judged."""
WINDOW = 50
"""Steps over which predicted classes are counted."""
MOST = 0.99
"""Share of one class among a task's predictions from which on its answers have collapsed."""


@dataclass(frozen=True, eq=False)
class Data:
    """task -> batches to learn from, and to validate with (may be empty); task -> (module, batch) -> outputs."""

    train: Mapping[str, Sequence[Any]]
    validation: Mapping[str, Sequence[Any]]
    function: Mapping[str, Function]


class Tuner:
    """Learns the numbers of a resident module.

    stopped  why it ended before the last step, or ''
    """

    def __init__(
        self, setting: Setting, numbers: Sequence[Numbers], resident: Resident, data: Data, journal: Journal
    ) -> None:
        self.setting, self.numbers, self.resident, self.data, self.journal = setting, numbers, resident, data, journal
        self.raw = [raw for one in numbers for raw in one.raw]
        ahead = () if setting.ahead is None else setting.ahead.names
        self._inner, self._outer = ([n for n in numbers if (n.name in ahead) == inner] for inner in (True, False))
        self.optimizer = setting.descent.optimizer_of([raw for one in self._outer for raw in one.raw])
        self._inner_optimizer = None
        if setting.ahead is not None:
            self._inner_optimizer = setting.ahead.descent.optimizer_of([r for one in self._inner for r in one.raw])
        self.state = State()
        self.best = [raw.detach().clone() for raw in self.raw]
        self.stopped = ""
        self._drawn = any(one.drawn for one in numbers)
        self._begun = [raw.detach().clone() for raw in self.raw]
        self._kept: list[Tensor] = []
        self._first = [[value.detach().clone() for value in one.values()] for one in numbers]

    def run(self, *, every: int = 10, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Take all steps that are left; afterwards the numbers are the best, by validation where there is one.

        every  steps between two looks at the validation data
        """
        self._resume()
        if self.setting.budget and not self._kept:
            self._choose()
        steps = self.setting.descent.steps
        while self.state.step < steps and not self._over():
            step = self.state.step
            row: dict[str, float] = {"step": step}
            if step % every == 0 and self._drawn:
                self._refresh()
                self._validate(row)
            self._refresh(step)
            if step % every == 0 and not self._drawn:
                self._validate(row)
            if self._over():
                break
            losses = self._learn(step)
            row["loss"] = sum(losses.values()) / len(losses)  # as validation counts: the mean over tasks
            row |= {f"loss {task}": value for task, value in losses.items()}
            self.state.curve.append(row)
            self.state.step = step + 1
            self._note()
            if progress is not None:
                progress(step + 1, steps, row["loss"])
        self._refresh()
        last: dict[str, float] = {"step": self.state.step}
        if self._validate(last):
            self.state.curve.append(last)
            self._put(self.best)
            self._refresh()
        self._note()

    def _over(self) -> bool:
        return bool(self.stopped)

    def evaluate(self, data: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
        """Task -> what the objective measures of every batch, with the module as it is."""
        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for task, batches in data.items():
                outputs = (self.data.function[task](self.resident.module, batch) for batch in batches)
                pairs = zip(outputs, batches, strict=True)
                found[task] = [float(self.setting.objective.measure(made, batch, task)) for made, batch in pairs]
        return found

    def put(self, values: Sequence[Tensor]) -> None:
        """Take these numbers (of the optimizer), and merge with them."""
        self._put(values)
        self._refresh()

    def start(self) -> None:
        """Take the numbers of the beginning, and merge with them."""
        self.put(self._begun)

    # -- a step

    def _refresh(self, step: int | None = None) -> None:
        """Merge with the numbers as they are; where values are drawn, with those of a step or their mean."""
        for one in self.numbers:
            one.step = step
            one.put()
        self.resident.refresh()

    def _learn(self, step: int) -> dict[str, float]:
        if self._inner_optimizer is None:
            losses = self._moved(step, self._outer, self.optimizer, self.setting.descent, step)
        else:
            assert self.setting.ahead is not None
            self._moved(2 * step, self._inner, self._inner_optimizer, self.setting.ahead.descent, step)
            self._refresh(step)  # the same draw
            losses = self._moved(2 * step + 1, self._outer, self.optimizer, self.setting.descent, step)
            self._back()
        self._collapsed(step)
        return losses

    def _back(self) -> None:
        """Put the inner numbers back to their start."""
        begun = {id(raw): first for raw, first in zip(self.raw, self._begun, strict=True)}
        with torch.no_grad():
            for raw in (raw for one in self._inner for raw in one.raw):
                raw.copy_(begun[id(raw)])

    def _moved(
        self, visit: int, numbers: Sequence[Numbers], optimizer: torch.optim.Optimizer, descent: Descent, step: int
    ) -> dict[str, float]:
        """Move some of the numbers once, on the batches of a visit; the mean loss of each task that was visited."""
        losses = self._slopes(visit, numbers, step)
        self._pull(numbers)
        for raw, kept in zip(self.raw, self._kept, strict=False):
            if raw.grad is not None:
                raw.grad *= kept
        descent.step(optimizer, step)
        for one in numbers:
            one.project()
        with torch.no_grad():  # weight decay moves those without a gradient too
            for raw, kept, begun in zip(self.raw, self._kept, self._begun, strict=False):
                raw.copy_(torch.where(kept, raw, begun))
        return losses

    def _choose(self) -> None:
        """Of each tensor, keep the models whose numbers have the largest gradients at the start, over a few batches."""
        self._refresh()
        total = [torch.zeros_like(raw) for raw in self.raw]
        for visit in range(min(LOOKS, max(map(len, self.data.train.values())))):
            self._slopes(visit, self.numbers, 0)
            for slope, raw in zip(total, self.raw, strict=True):
                slope += torch.zeros_like(raw) if raw.grad is None else raw.grad
        for one in self.numbers:
            for raw in one.raw:
                slope = total[next(i for i, own in enumerate(self.raw) if own is raw)]
                size = slope.norm(dim=1) if one.free.several else slope.abs()
                kept = torch.zeros_like(size, dtype=torch.bool)
                kept.scatter_(-1, size.topk(min(self.setting.budget, size.shape[-1]), dim=-1).indices, True)
                self._kept.append(kept[:, None].expand_as(raw) if one.free.several else kept)

    def _slopes(self, visit: int, numbers: Sequence[Numbers], step: int) -> dict[str, float]:
        """Give the numbers the gradient of the batches of a visit; the mean loss of each task that was visited."""
        losses: dict[str, list[float]] = {}
        for raw in (raw for one in numbers for raw in one.raw):
            raw.grad = None
        with self.resident.gathering(self.setting.gather) as found:
            for task, place, share in self._turns(visit):
                batches = self.data.train[task]
                batch = batches[place % len(batches)]
                loss = self._loss(task, batch, watch=True)
                value = float(loss.detach())
                if not math.isfinite(value):
                    self._put([self.state.tensors.get(f"raw.{i}", raw) for i, raw in enumerate(self.raw)])
                    self._note()
                    raise NumericError(
                        f"step {step + 1}: the loss of {task} is {value:g} at its batch {place % len(batches) + 1}; "
                        "the numbers of the step before are kept; lower lr"
                    )
                torch.autograd.backward(loss * share)
                losses.setdefault(task, []).append(value)
        for one in numbers:
            one.backward(found)
        return {task: sum(values) / len(values) for task, values in losses.items()}

    def _turns(self, step: int) -> list[tuple[str, int, float]]:
        """(task, number of its batch, share in the loss) of a step."""
        tasks = list(self.data.train)
        if not self.setting.turns:
            return [(task, step, 1.0) for task in tasks]
        count = self.setting.descent.accumulate
        visits = range(step * count, (step + 1) * count)
        return [(tasks[i % len(tasks)], i // len(tasks), 1 / count) for i in visits]

    def _loss(self, task: str, batch: Any, *, watch: bool = False) -> Tensor:
        outputs = self.data.function[task](self.resident.module, batch)
        if watch and self.setting.objective.collapses:
            self._watch(task, logits_of(outputs))
        return self.setting.objective.loss(outputs, batch, task)

    def _pull(self, numbers: Sequence[Numbers]) -> None:
        """Add the gradient of pull * sum |value - start| / (numbers per model)."""
        if not self.setting.pull:
            return
        for one, first in zip(self.numbers, self._first, strict=True):
            if one not in numbers:
                continue
            per_model = one.count / len(one.models)
            far = sum((value - start).abs().sum() for value, start in zip(one.values(), first, strict=True))
            torch.autograd.backward(torch.as_tensor(self.setting.pull * far / per_model))

    # -- validation and collapse

    def _validate(self, row: dict[str, float]) -> bool:
        if not any(self.data.validation.values()):
            return False
        found = self.evaluate(self.data.validation)
        now = {task: sum(values) / len(values) for task, values in found.items() if values}
        row |= {f"{SEEN}{task}": value for task, value in now.items()}
        start = next((seen for seen in self.state.curve if any(name.startswith(SEEN) for name in seen)), row)
        first = {name.removeprefix(SEEN): value for name, value in start.items() if name.startswith(SEEN)}
        row["validation"] = self.setting.objective.judge(first, now)
        if self.state.best is None or row["validation"] < self.state.best[0]:
            self.state.best = (row["validation"], self.state.step)
            self.best = [raw.detach().clone() for raw in self.raw]
        if (why := self.setting.objective.ended(first, now)) and not self.stopped:
            self.stopped = f"stopped at step {self.state.step}: {why}"
        return True

    def _watch(self, task: str, logits: Tensor) -> None:
        classes = logits.detach().argmax(dim=-1).flatten()
        counts = self.state.watched.setdefault(task, [])
        now: dict[str, int] = {}
        for place, count in zip(*torch.unique(classes, return_counts=True), strict=True):
            now[str(int(place))] = int(count)
        counts.append(now)
        del counts[1:-WINDOW]  # the first shows how it was

    def _collapsed(self, step: int) -> None:
        for task, counts in self.state.watched.items():
            if len(counts) > WINDOW and _largest(counts[-WINDOW:]) >= MOST and _largest(counts[:1]) < 0.9:
                self.stopped = (
                    f"stopped at step {step + 1}: nearly all answers of {task} are one class, which has no entropy but "
                    "no worth either"
                )

    def histogram(self) -> dict[str, dict[str, int]]:
        """Task -> predicted class -> count, over the last steps."""
        return {task: _added(counts[-WINDOW:]) for task, counts in self.state.watched.items()}

    # -- journal

    def _resume(self) -> None:
        if (found := self.journal.read()) is None:
            return
        self.state = found
        self._put([found.tensors[f"raw.{i}"] for i in range(len(self.raw))])
        self.best = [found.tensors[f"best.{i}"].clone() for i in range(len(self.raw))]
        self._kept = [found.tensors[f"kept.{i}"] for i in range(len(self.raw)) if f"kept.{i}" in found.tensors]
        for prefix, optimizer in (("opt.", self.optimizer), ("inner.", self._inner_optimizer)):
            state = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
            if state and optimizer is not None:
                restore(optimizer, state)

    def _note(self) -> None:
        tensors = {f"raw.{i}": raw.detach().clone() for i, raw in enumerate(self.raw)}
        tensors |= {f"best.{i}": best for i, best in enumerate(self.best)}
        tensors |= {f"kept.{i}": kept for i, kept in enumerate(self._kept)}
        tensors |= {f"opt.{name}": tensor for name, tensor in state_of(self.optimizer).items()}
        if self._inner_optimizer is not None:
            tensors |= {f"inner.{name}": tensor for name, tensor in state_of(self._inner_optimizer).items()}
        self.state.tensors = tensors
        self.journal.write(self.state)

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for raw, value in zip(self.raw, values, strict=True):
                raw.copy_(value)


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def _largest(counts: Sequence[Mapping[str, int]]) -> float:
    total = _added(counts)
    return max(total.values()) / sum(total.values())
