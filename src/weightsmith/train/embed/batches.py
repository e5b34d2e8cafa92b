"""Batches of one task each, the same task on every rank at every step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from weightsmith.core.errors import RecipeError

__all__ = ["TaskBatches"]


class TaskBatches(Sampler[list[int]]):
    """CoDiEmb's dynamic sampler (arXiv 2508.11442): a batch sampler over a `ConcatDataset`.

        sampler = TaskBatches([len(a), len(b)], batch_sizes=[32, 64], seed=0)
        DataLoader(ConcatDataset([a, b]), batch_sampler=sampler)

    lengths       rows of each dataset
    batch_sizes   of each dataset, per rank and micro-step
    ranks, rank   processes, and this one's number
    accumulation  micro-steps of one optimizer step: all of them come from one dataset
    max_batches   optimizer steps that a dataset gets per epoch at most; a random part of its rows then
    seed          together with `set_epoch` decides all orders

    Each dataset is permuted and cut into full batches for all ranks; the tail is left out.  Then the order of all
    batches is drawn, alike on every rank.  A dataset gets updates in proportion to its rows over its own batch size.
    A dataset that does not fill one such batch gets none, with a warning.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_sizes: Sequence[int],
        *,
        ranks: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        max_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(lengths) != len(batch_sizes) or min([*batch_sizes, ranks, accumulation, max_batches or 1]) < 1:
            raise RecipeError(
                f"every one of {len(lengths)} datasets needs a batch size of at least 1, got {list(batch_sizes)}"
                if len(lengths) != len(batch_sizes) or min(batch_sizes) < 1
                else "ranks, accumulation and max_batches must be at least 1"
            )
        if not 0 <= rank < ranks:
            raise RecipeError(f"rank must be in 0 .. {ranks - 1}, got {rank}")
        self.lengths, self.batch_sizes = tuple(lengths), tuple(batch_sizes)
        self.ranks, self.rank, self.accumulation, self.seed, self.epoch = ranks, rank, accumulation, seed, 0
        self.steps = [n // self._rows(d) for d, n in enumerate(lengths)]
        for d, (steps, n) in enumerate(zip(self.steps, lengths, strict=True)):
            if not steps:
                warnings.warn(
                    f"dataset {d} has {n} rows, fewer than the {self._rows(d)} of one step over all ranks: "
                    "it will not be used; lower its batch size",
                    stacklevel=2,
                )
        if max_batches is not None:
            self.steps = [min(steps, max_batches) for steps in self.steps]

    def _rows(self, dataset: int) -> int:
        """Rows of one optimizer step."""
        return self.batch_sizes[dataset] * self.ranks * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one rank in one epoch: micro-steps."""
        return sum(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Row numbers in the concatenated dataset, a micro-step of this rank at a time."""
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = []
        start = 0
        for d, (length, steps) in enumerate(zip(self.lengths, self.steps, strict=True)):
            rows = torch.randperm(length, generator=draw)[: steps * self._rows(d)] + start
            batches += [*rows.view(steps, self.accumulation, self.ranks, self.batch_sizes[d])]
            start += length
        for step in torch.randperm(len(batches), generator=draw).tolist():
            for micro in batches[step]:
                yield micro[self.rank].tolist()
