"""CoDiEmb's losses as functions of embeddings and similarities (arXiv 2508.11442 and its released code)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from weightsmith.core.errors import PlanError, RecipeError

__all__ = ["info_nce", "pearson", "pro", "rank_kl", "similarity"]

TIE = 1e-8
"""Labels that differ by no more than this are equal."""

STILL = 1e-12
"""Variance of similarities below which they count as constant: their correlation would be 0 / 0."""


def info_nce(query: Tensor, passages: Tensor, positives: int = 1, temperature: float = 0.02, first: int = 0) -> Tensor:
    """Contrastive loss with several positives: a scalar, for retrieval.

    query        [b, d], of unit length for cosine similarities
    passages     [B, positives + negatives, d]: of each of B queries its positives, then its negatives
    temperature  divides the products
    first        the place of query[0] among the B queries: B > b where passages were gathered from all ranks

    For slot p the candidates of a query are the p-th positives and the negatives of all B queries, so the other
    positives of the same query are no negatives of it.  Cross-entropy, averaged over queries and slots.
    """
    _positive("temperature", temperature)
    if passages.ndim != 3 or not 1 <= positives <= passages.shape[1] or first + len(query) > len(passages):
        raise PlanError(
            [
                f"passages must be [queries, {positives} positives and their negatives, width] for queries {first} to "
                f"{first + len(query)}, got {list(passages.shape)}"
            ]
        )
    scores = torch.einsum("qd,bed->qbe", query, passages) / temperature  # [b, B, positives + negatives]
    own = (torch.arange(len(query), device=query.device) + first) * (1 + passages.shape[1] - positives)
    slots = [
        cross_entropy(torch.cat([scores[:, :, slot : slot + 1], scores[:, :, positives:]], 2).flatten(1), own)
        for slot in range(positives)
    ]
    return torch.stack(slots).mean()


def pearson(predicted: Tensor, label: Tensor) -> Tensor:
    """1 - the correlation of similarities [N] with scores [N]: a scalar in [0, 2].

    0 without a gradient to anything where all scores are equal; 1 where all similarities are.
    """
    label = label.to(predicted.dtype)
    centred = label - label.mean() if label.numel() else label
    if not bool(((label - label[:1]).abs() > TIE).any()):
        return predicted.sum() * 0
    unit = centred / centred.norm()
    moved = predicted - predicted.mean()
    # Clamped, not shifted by an epsilon: exact elsewhere, and no 0 / 0 in the gradient of a square root at 0.
    length = moved.square().sum().clamp(min=STILL * len(moved)).sqrt()
    found: Tensor = 1 - (moved / length) @ unit
    return found


def rank_kl(predicted: Tensor, label: Tensor, temperature: float = 0.05) -> Tensor:
    """Divergence of softmax(similarities / T) from softmax(ranks / T) over a batch, divided by its size: a scalar.

    Scores [N] count by their order only: the best has 1, the worst 0, equal ones their mean rank.
    """
    _positive("temperature", temperature)
    if not len(label):
        return predicted.sum() * 0
    above = (label[None] > label[:, None]).sum(1)
    equal = (label[None] == label[:, None]).sum(1)
    rank = above + (equal - 1) / 2  # 0 for the best
    last = max(len(label) - 1, 1)
    target = ((last - rank) / last / temperature).to(predicted.dtype).log_softmax(0)
    return (target.exp() * (target - (predicted / temperature).log_softmax(0))).sum() / len(label)


def pro(predicted: Tensor, label: Tensor, temperature: float = 0.05) -> Tensor:
    """Preference ranking (PRO) of similarities [N] by scores [N]: a scalar.

    Every item k competes with the items j of lower score, each weighted by the gap w_j = y_k - y_j, itself by the
    largest gap: -log softmax of w_k s_k / T among w_j s_j / T, averaged over the k that have such j.  0 where all
    scores are equal.
    """
    _positive("temperature", temperature)
    gap = (label[:, None] - label[None]).to(predicted.dtype)  # [k, j]
    lower = gap > TIE
    counted = lower.any(1)
    if not bool(counted.any()):
        return predicted.sum() * 0
    gap, lower = gap[counted], lower[counted]
    own = gap.amax(1) * predicted[counted] / temperature
    others = (gap * predicted / temperature).masked_fill(~lower, -torch.inf)
    return (torch.logsumexp(torch.cat([own[:, None], others], 1), 1) - own).mean()


def similarity(
    predicted: Tensor,
    label: Tensor,
    temperature: float = 0.05,
    w_pearson: float = 2.0,
    w_kl: float = 5.0,
    w_pro: float = 0.5,
) -> Tensor:
    """CoDiEmb's loss of graded pairs: w_pearson pearson + w_kl rank_kl + w_pro pro of similarities and scores [N].

    The optional contrastive term on the last layer but one of the released code is left out.
    """
    if predicted.shape != label.shape or predicted.ndim != 1:
        raise PlanError(
            [f"similarities and scores must be two lists of one length, got {[*predicted.shape]} and {[*label.shape]}"]
        )
    return (
        w_pearson * pearson(predicted, label)
        + w_kl * rank_kl(predicted, label, temperature)
        + w_pro * pro(predicted, label, temperature)
    )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise RecipeError(f"{name} must be above 0, got {value!r}")
