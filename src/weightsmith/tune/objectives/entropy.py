"""Confident answers, without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weightsmith.tune.objective import Objective, logits_of, mean_of

__all__ = ["Entropy", "entropy"]


@dataclass(frozen=True)
class Entropy(Objective, name="entropy"):
    """Minimise the entropy of the predicted classes; needs inputs only.

    Source: AdaMerging (Yang et al., ICLR 2024), equation 5.  Of a language model: of the next token, averaged over
    positions that are no padding (an extension).  A constant answer is an optimum too.
    """

    collapses: ClassVar[bool] = True

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        return mean_of(entropy(logits_of(outputs)), batch)


ROWS = 4 << 20
"""Scores that are looked at at a time."""


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p of p = softmax over the last axis: [*, classes] -> [*], in the logits' dtype.

    Besides the scores, which it keeps for the backward pass, it holds a few megabytes; autograd holds four tensors as
    large as the scores, which of a language model are most of the memory.  A score of -Inf, as of classes that are
    masked, adds nothing.
    """
    made: Tensor = _Entropy.apply(logits)  # type: ignore[no-untyped-call]
    return made


def _logs(rows: Tensor) -> Tensor:
    return rows.log_softmax(dim=-1).clamp_(min=torch.finfo(rows.dtype).min / 2)


class _Entropy(torch.autograd.Function):
    """dH / dlogit = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        found = logits.new_empty(logits.shape[:-1])
        for rows, out in _blocks(logits, found):
            logs = _logs(rows)
            out.copy_(-(logs.exp().mul_(logs)).sum(dim=-1))
        ctx.save_for_backward(logits, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        logits, found = ctx.saved_tensors
        slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows, values, outer, out in _blocks(logits, found, gradient, slope):
            logs = _logs(rows)
            torch.mul((logs + values[:, None]).mul_(logs.exp_()), -outer[:, None], out=out)
        return slope


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the scores, [rows, classes], and what belongs to them in the others."""
    flat = [logits.flatten(0, -2), *(one.reshape(-1, *one.shape[logits.ndim - 1 :]) for one in others)]
    step = max(1, ROWS // logits.shape[-1])
    return zip(*(one.split(step) for one in flat), strict=True)  # type: ignore[no-untyped-call]
