"""Confident answers, without labels."""

from __future__ import annotations

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


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p of p = softmax over the last axis: [*, classes] -> [*], in the logits' dtype.

    For the backward pass it keeps log p alone, where autograd keeps three tensors of that size; of a language model
    that is most of the memory.  A score of -Inf, as of classes that are masked, adds nothing.
    """
    made: Tensor = _Entropy.apply(logits)  # type: ignore[no-untyped-call]
    return made


class _Entropy(torch.autograd.Function):
    """dH / dlogit = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        logs = logits.log_softmax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min / 2)
        found = -(logs.exp().mul_(logs)).sum(dim=-1)
        ctx.save_for_backward(logs, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        logs, found = ctx.saved_tensors
        slope: Tensor = (logs + found[..., None]).mul_(logs.exp()).mul_(-gradient[..., None])
        return slope
