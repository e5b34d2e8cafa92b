"""Exact selection by magnitude, over more than memory holds.

The bits of |x| as float32, read as an integer, are in the order of |x|.  So counting the upper 16 bits in one
pass and the lower 16 bits of one bucket in a second gives the exact k-th largest magnitude with 0.5 MB of state.

Entries are ranked by falling magnitude, equals by rising flat index.  A *cut* p splits the ranking behind its
first p entries.  Three measuring rounds per set of cuts (or two, if all equals at a cut belong together):

    round 0   counts of the upper 16 bits
    round 1   counts of the lower 16 bits within the bucket of the cut   -> exact threshold
    round 2   equals of the threshold, per row                           -> which of them lie before the cut

float64 inputs are ranked by their magnitude rounded to float32.  Everything is integer arithmetic: the same
for every way to cut a tensor into blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.kernel import HIGH, LOW
from weightsmith.core.lazy import torch
from weightsmith.core.method import Rows
from weightsmith.core.site import Summary
from weightsmith.ops.reduce import as_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EVERYTHING",
    "NOTHING",
    "ROUNDS",
    "Cuts",
    "before",
    "digest",
    "histogram",
    "histograms",
    "keep_share",
    "leading",
    "locate",
    "magnitude_bits",
    "measure",
    "settled",
    "untrimmed",
]

ROUNDS = 3
NONE, ALL = HIGH, -1  # buckets that stand for a cut in front of and behind all entries
NOTHING, EVERYTHING = 0x7FFFFFFF, -1  # and thresholds

Cuts = Callable[[int, int], Sequence[Sequence[int]]]
"""(number of experts, number of entries) -> for each expert, its cuts."""


def magnitude_bits(values: Tensor) -> Tensor:
    """|x| as float32 bits, int32, ordered as |x| is."""
    return values.detach().to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def histogram(buckets: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size-1 occurs: int64 [size]."""
    return torch.bincount(buckets.reshape(-1), minlength=size)


def histograms(buckets: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The histograms of several lists, int64 [*shape] on the CPU, made one by one: those of 48 experts are large."""
    out = torch.empty(shape, dtype=torch.int64)
    for counts, found in zip(out.view(-1, shape[-1]), buckets, strict=True):
        counts.copy_(histogram(found, shape[-1]))
    return out


def measure(stack: Tensor, summary: Summary, round: int) -> dict[str, Tensor | Rows]:
    """Observe one block, [n, *block], in one of the three rounds."""
    bits = map(magnitude_bits, stack)
    if round == 0:
        return {"select.high": histograms((b >> 16 for b in bits), (stack.shape[0], HIGH))}
    if round == 1:
        buckets = np.asarray(summary["select.bucket"])
        low = (
            b[b >> 16 == bucket] & 0xFFFF for b, found in zip(bits, buckets.tolist(), strict=True) for bucket in found
        )
        return {"select.low": histograms(low, (*buckets.shape, LOW))}
    thresholds = summary["select.threshold"].tolist()
    equal = [torch.stack([(as_rows(b) == t).sum(1) for t in found]) for b, found in zip(bits, thresholds, strict=True)]
    return {"select.equal": Rows(torch.stack(equal).cpu())}


def digest(totals: Summary, round: int, summary: Summary, cuts: Cuts, whole: bool = False) -> dict[str, Any]:
    """Turn a round's totals (tensors or arrays) into the summary, arrays, that the next round and `before` read.

    `whole`: equals at a cut all count as before it (then round 2 is not needed).
    """
    if round == 0:
        return {**summary, **_find_buckets(np.asarray(totals["select.high"]), cuts)}
    if round == 1:
        return {**summary, **_find_thresholds(np.asarray(totals["select.low"]), summary, whole)}
    equal = np.asarray(totals["select.equal"])
    return {**summary, "select.earlier": equal.cumsum(-1) - equal}


def _find_buckets(high: np.ndarray, cuts: Cuts) -> dict[str, Any]:
    wanted = np.array(cuts(high.shape[0], int(high[0].sum())), np.int64)
    total = high.sum(-1, keepdims=True)
    bucket, left, _ = locate(high, wanted)
    bucket = np.where(wanted <= 0, NONE, np.where(wanted >= total, ALL, bucket))
    return {"select.bucket": bucket, "select.left": left, "select.total": np.broadcast_to(total, bucket.shape)}


def _find_thresholds(low: np.ndarray, summary: Summary, whole: bool) -> dict[str, Any]:
    bucket, left = np.asarray(summary["select.bucket"]), np.asarray(summary["select.left"])
    place, quota, ties = (found[..., 0] for found in locate(low, left[..., None]))
    inside = (bucket != NONE) & (bucket != ALL)
    threshold = np.where(inside, (bucket << 16) | place, np.where(bucket == NONE, NOTHING, EVERYTHING))
    ties = np.where(inside, ties, 0)
    quota = ties if whole else np.where(inside, quota, 0)
    return {"select.threshold": threshold, "select.quota": quota, "select.ties": ties}


def untrimmed(summary: Summary) -> dict[int, float]:
    """Share of entries that are not 0, of every expert whose first cut lies among its zeros."""
    found = (summary[f"select.{name}"][:, 0].tolist() for name in ("threshold", "ties", "total"))
    return {i: 1 - zeros / total for i, (cut, zeros, total) in enumerate(zip(*found, strict=True)) if cut == 0}


def locate(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bucket of the rank-th largest entry (from 1), its rank within, and the bucket's size.

    counts: [*, buckets]; ranks: [*, r]; three times [*, r].
    """
    size = counts.shape[-1]
    at_least = counts[..., ::-1].cumsum(-1).reshape(-1, size)  # [j]: entries in bucket size-1-j and above
    wanted = np.maximum(ranks, 1).reshape(at_least.shape[0], -1)
    j = np.stack([np.searchsorted(row, rank) for row, rank in zip(at_least, wanted, strict=True)])
    j = np.minimum(j, size - 1)
    inside = np.take_along_axis(counts.reshape(-1, size), size - 1 - j, -1)
    before_it = np.take_along_axis(at_least, j, -1) - inside
    return (size - 1 - j).reshape(ranks.shape), ranks - before_it.reshape(ranks.shape), inside.reshape(ranks.shape)


def settled(summary: Summary) -> bool:
    """Whether no cut splits equals, so that round 2 has nothing to say."""
    return bool((summary["select.quota"] == summary["select.ties"]).all())


def before(stack: Tensor, summary: Summary, start: int = 0) -> list[Tensor]:
    """For each cut, which entries of a block lie before it: a list of bool [n, *block].

    `start` is the block's first row within the tensor.
    """
    thresholds, quotas, ties = (summary[f"select.{k}"].tolist() for k in ("threshold", "quota", "ties"))
    masks = [torch.empty(stack.shape, dtype=torch.bool, device=stack.device) for _ in thresholds[0]]
    for i, b in enumerate(map(magnitude_bits, stack)):
        for cut, found in enumerate(masks):
            threshold, quota = thresholds[i][cut], quotas[i][cut]
            if quota == ties[i][cut]:
                found[i] = b >= threshold if quota else b > threshold
            else:
                equal = b == threshold
                rank = int(summary["select.earlier"][i, cut, start]) + equal.reshape(-1).cumsum(0).reshape(b.shape)
                found[i] = (b > threshold) | (equal & (rank <= quota))
    return masks


def keep_share(total: int, density: float) -> int:
    """How many of `total` entries a density keeps: int(density * total), at least one."""
    return total if density >= 1 else max(1, int(density * total))


def leading(values: Tensor, count: int) -> Tensor:
    """The `count` largest |x| of each row, equals by lower index: bool, shaped like values [..., m]."""
    length = values.shape[-1]
    if count <= 0 or count >= length:
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    size = values.detach().abs()
    threshold = size.kthvalue(length - count + 1, dim=-1, keepdim=True).values
    larger, equal = size > threshold, size == threshold
    return larger | (equal & (equal.cumsum(-1) <= count - larger.sum(-1, keepdim=True)))
