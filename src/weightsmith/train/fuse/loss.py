"""The loss against a mixture of distributions, without ever building it over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.train.fuse.gate import Gate, balance
from weightsmith.train.fuse.topk import TopK, stacked

__all__ = ["Fusion", "fused_loss"]

IGNORED = -100
"""A label that counts for nothing, as everywhere in torch."""


def fused_loss(
    logits: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    weights: Tensor,
    mask: Tensor,
    kind: Literal["ce", "kl"] = "ce",
) -> Tensor:
    """Cross-entropy, or divergence, of a student from q = sum_i w_i p_i, averaged over positions: a scalar.

    logits         the student's [batch, length, vocabulary]; position t predicts token t + 1, as the candidates' do
    ids            int64 [batch, length, m, k]
    probabilities  [batch, length, m, k]
    weights        [batch, m], see `Gate`
    mask           bool [batch, length]: positions that count

    Memory: batch x length x m k beside the logits.
    """
    if kind not in ("ce", "kl"):
        raise RecipeError(f"loss must be ce or kl, got {kind!r}")
    if ids.numel() and int(ids.max()) >= logits.shape[-1]:
        raise PlanError([f"a candidate has token {int(ids.max())}, the student's vocabulary is {logits.shape[-1]}"])
    mixed = (probabilities * weights[:, None, :, None]).flatten(2)  # q, spread over m k entries; ids may repeat
    logits = logits.float()
    chosen = logits.gather(-1, ids.flatten(2)) - logits.logsumexp(-1, keepdim=True)
    each = -(mixed * chosen).sum(-1)
    if kind == "kl":
        q = _merged(ids.flatten(2), mixed)
        each = each + (q * q.clamp(min=torch.finfo(q.dtype).tiny).log()).sum(-1)  # a gradient at q = 0 too
    return (each * mask).sum() / mask.sum().clamp(min=1)


def _merged(ids: Tensor, q: Tensor) -> Tensor:
    """The probability of each different id, in the place of its first in sorted order, 0 elsewhere: [..., m k]."""
    ids, order = torch.sort(ids, dim=-1, stable=True)
    new = torch.ones_like(ids)
    new[..., 1:] = ids[..., 1:] != ids[..., :-1]
    return torch.zeros_like(q).scatter_add(-1, new.cumsum(-1) - 1, q.gather(-1, order))


class Fusion(nn.Module):
    """The whole loss: lm_weight LM + (1 - lm_weight) fused + feedback_weight balance of the gate's weights.

    gate                 a `Gate`, or a fixed rule that maps losses [batch, m] to weights [batch, m]
    teacher_temperature  of the candidates' distributions

    After a call `last` holds its parts, as numbers.
    """

    def __init__(
        self,
        gate: Any,
        *,
        lm_weight: float = 0.9,
        feedback_weight: float = 0.5,
        kind: Literal["ce", "kl"] = "ce",
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= lm_weight <= 1 or feedback_weight < 0 or teacher_temperature <= 0 or kind not in ("ce", "kl"):
            raise RecipeError(
                "lm_weight must be in [0, 1], feedback_weight at least 0, teacher_temperature above 0, kind ce or kl; "
                f"got {lm_weight}, {feedback_weight}, {teacher_temperature}, {kind!r}"
            )
        self.gate = gate
        self.lm_weight, self.feedback_weight = lm_weight, feedback_weight
        self.kind: Literal["ce", "kl"] = kind
        self.teacher_temperature = teacher_temperature
        self.last: dict[str, float] = {}

    def parts(
        self, logits: Tensor, labels: Tensor, candidates: Sequence[TopK], weights: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Sums of the LM and the fused loss over positions that have a next token, and how many these are.

        They add up over the micro-batches of a step.  `weights` are what the gate gives for all of them.
        """
        ids, probabilities = stacked(candidates, self.teacher_temperature)
        following = labels[:, 1:]
        mask, count = following != IGNORED, int((following != IGNORED).sum())
        kept = logits[:, :-1].float()
        lm = cross_entropy(kept.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum")
        fused = fused_loss(kept, ids[:, :-1], probabilities[:, :-1], weights, mask, self.kind)
        return lm, fused * count, count

    def forward(self, logits: Tensor, labels: Tensor, candidates: Sequence[TopK], losses: Tensor) -> Tensor:
        """A scalar.

        logits      of the student [batch, length, vocabulary]
        labels      int64 [batch, length]: the tokens themselves, -100 where none counts (padding)
        candidates  on the student's tokens and positions, see `Alignment.apply`
        losses      mean losses [batch, m] of the candidates on each sequence, nan where one is missing
        """
        weights = self.gate(losses)
        ids, probabilities = stacked(candidates, self.teacher_temperature)
        lm = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
        fused = fused_loss(logits, ids, probabilities, weights, labels != IGNORED, self.kind)
        spread = balance(weights) if isinstance(self.gate, Gate) else weights.sum() * 0
        self.last = {
            "lm": lm.detach().item(),
            "fused": fused.detach().item(),
            "balance": spread.detach().item(),
            "candidates": float((weights > 0).sum(1).float().mean()),
        }
        return self.lm_weight * lm + (1 - self.lm_weight) * fused + self.feedback_weight * spread
