"""Which examples of which tasks a step trains on: one sequence for all ranks, a function of seed and step alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from weightsmith.core.errors import RecipeError, did_you_mean

__all__ = ["LOW", "MultiTaskSampler", "Sampling", "rates_of"]

Sampling = Literal["unmixed", "mixed", "proportional", "temperature", "concat"]

LOW = 0.01
"""Below this rate 1/s makes the gradients of `MTAdamW` spike."""


def rates_of(lengths: Mapping[str, int], temperature: float = 2.0) -> dict[str, float]:
    """Rates s_k in proportion to n_k^(1/T) [sum 1]: T = 1 is proportional, 2 the root, infinity equal."""
    if not temperature > 0:
        raise RecipeError(f"temperature must be above 0, got {temperature:g}")
    top = max(lengths.values(), default=0)
    shares = {name: (n / top) ** (1 / temperature) for name, n in lengths.items() if top}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


class MultiTaskSampler(Sampler[list[int]]):
    """A batch sampler over the concatenation of several tasks' examples (Uni-Perceiver v2, arXiv 2211.09808).

        sampler = MultiTaskSampler({"a": 500, "b": 90}, steps=100, batch=32)
        DataLoader(ConcatDataset([a, b]), batch_sampler=sampler)

    lengths       task -> number of its examples
    rates         task -> s_k, which sum to one; default: in proportion to n_k^(1/temperature)
    how           unmixed: every step draws one task, whose batch it is on all ranks and in all micro-steps
                  mixed: every batch holds round(s_k batch) examples of every task
                  proportional, temperature: every example's task is drawn, by n_k or by the rates
                  concat: all examples, shuffled
    ranks, rank   processes, and the number of this one: all draw the same tasks, each takes its part of the rows
    accumulation  micro-steps of one step

    The examples of a task come in permutations of all of them.  `task(step)` and `micro_batches(step)` need no state,
    so a run goes on from a step without replaying those before it.  Errors: RecipeError.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        rates: Mapping[str, float] | None = None,
        *,
        steps: int,
        batch: int,
        how: Sampling = "unmixed",
        temperature: float = 2.0,
        accumulation: int = 1,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if min(steps, batch, accumulation, ranks) < 1 or not 0 <= rank < ranks:
            raise RecipeError("steps, batch, accumulation and ranks must be at least 1, and rank below ranks")
        if empty := [name for name, n in lengths.items() if n < 1]:
            raise RecipeError(f"task {empty[0]!r} has no examples; leave it out")
        self.lengths, self.names = dict(lengths), tuple(lengths)
        if how == "proportional":
            temperature = 1.0
        self.rates = rates_of(lengths, temperature) if rates is None else _checked(rates, lengths)
        self.how, self.steps, self.seed = how, steps, seed
        self._shape = (accumulation, ranks, batch)
        self._rank = rank
        self._tasks = self._drawn()  # [steps, rows of a step]: the number of each row's task
        self._places = torch.zeros_like(self._tasks)  # how many rows of its task came before
        flat = self._tasks.view(-1)
        for number in range(len(self.names)):
            own = flat == number
            self._places.view(-1)[own] = torch.arange(int(own.sum()), dtype=self._places.dtype)
        self._starts = [0]
        for n in self.lengths.values():
            self._starts.append(self._starts[-1] + n)

    def _drawn(self) -> Tensor:
        accumulation, ranks, batch = self._shape
        rows = math.prod(self._shape)
        draw = torch.Generator().manual_seed(self.seed)
        edges = torch.tensor([self.rates[name] for name in self.names], dtype=torch.float64).cumsum(0)[:-1]
        if self.how == "unmixed":
            drawn = torch.searchsorted(
                edges, torch.rand(self.steps, 1, generator=draw, dtype=torch.float64), right=True
            )
            return drawn.expand(-1, rows).contiguous()
        if self.how == "mixed":
            counts = _shares([self.rates[name] * batch for name in self.names], batch)
            each = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            return each.repeat(accumulation * ranks).expand(self.steps, -1).contiguous()
        if self.how == "concat":
            total = sum(self.lengths.values())
            sizes = torch.tensor([*self.lengths.values()]).cumsum(0)[:-1]
            return torch.searchsorted(sizes, _stream(total, self.steps * rows, self.seed), right=True).view(-1, rows)
        return torch.searchsorted(edges, torch.rand(self.steps, rows, generator=draw, dtype=torch.float64), right=True)

    def task(self, step: int) -> str | None:
        """The task of step 1 .. steps; None where a batch holds several."""
        return self.names[int(self._tasks[step - 1, 0])] if self.how == "unmixed" else None

    def micro_batches(self, step: int) -> list[list[int]]:
        """Rows of the concatenation: this rank's, a micro-step at a time."""
        shape = self._shape
        tasks, places = (own[step - 1].view(shape)[:, self._rank] for own in (self._tasks, self._places))
        return [
            [self._row(int(t), int(p)) for t, p in zip(*micro, strict=True)]
            for micro in zip(tasks, places, strict=True)
        ]

    def _row(self, task: int, place: int) -> int:
        n = self.lengths[self.names[task]]
        epoch, at = divmod(place, n)
        return self._starts[task] + int(_permutation(n, (self.seed * 1_000_003 + task) * 1_000_003 + epoch)[at])

    def __len__(self) -> int:
        return self.steps * self._shape[0]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(1, self.steps + 1):
            yield from self.micro_batches(step)


def _checked(rates: Mapping[str, float], lengths: Mapping[str, int]) -> dict[str, float]:
    for name in rates:
        if name not in lengths:
            raise RecipeError(f"rates: there is no task {name!r}{did_you_mean(name, list(lengths))}")
    for name in lengths:
        if not rates.get(name, 0) > 0:
            raise RecipeError(f"rates: task {name!r} has examples, but a rate of {rates.get(name, 0):g}; leave it out")
    total = sum(rates.values())
    if not abs(total - 1) < 1e-6:
        raise RecipeError(f"rates sum to {total:g}, not to 1; divide each by {total:g}")
    if low := [name for name, rate in rates.items() if rate < LOW]:
        warnings.warn(f"the rate of {low[0]!r} is below {LOW:g}: its gradients will spike", stacklevel=3)
    return dict(rates)


def _shares(wanted: list[float], batch: int) -> list[int]:
    """Whole numbers next to the wanted ones, at least 1 each, that sum to the batch (largest remainders)."""
    if batch < len(wanted):
        raise RecipeError(f"a mixed batch of {batch} holds no example of some of the {len(wanted)} tasks; enlarge it")
    counts = [max(1, math.floor(w)) for w in wanted]
    while sum(counts) != batch:
        step = 1 if sum(counts) < batch else -1
        able = [i for i, n in enumerate(counts) if step > 0 or n > 1]
        counts[max(able, key=lambda i: step * (wanted[i] - counts[i]))] += step
    return counts


def _permutation(n: int, seed: int) -> Tensor:
    """The last few are kept: consecutive rows of a task come from one."""
    if (found := _KEPT.get((n, seed))) is None:
        if len(_KEPT) >= 64:
            _KEPT.pop(next(iter(_KEPT)))
        found = _KEPT[n, seed] = torch.randperm(n, generator=torch.Generator().manual_seed(seed % (1 << 63)))
    return found


_KEPT: dict[tuple[int, int], Tensor] = {}


def _stream(n: int, count: int, seed: int) -> Tensor:
    """`count` numbers below n, in permutations."""
    epochs = [_permutation(n, seed * 1_000_003 + epoch) for epoch in range(-(-count // n))]
    return torch.cat(epochs)[:count]
