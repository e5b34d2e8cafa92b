"""The straightforward way to each codec: encode all experts of one matrix; what is returned is their mean, rebuilt.

Signatures as in `bench.plain`.  Rebuilding costs little beside encoding, and shows that the same was stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bitdelta", "emr_masks", "fwsvd", "losparse", "randes", "rmm", "tall_masks", "tsvc", "twin"]


def tall_masks(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    tau = deltas.sum(0)
    return _from_masks(deltas.abs() > 0.4 * (tau - deltas).abs(), tau, base)


def emr_masks(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    tau = deltas.sum(0)
    masks = deltas * tau > 0
    factors = deltas.abs().sum((1, 2)) / (masks * tau.abs()).sum((1, 2))
    return _from_masks(masks, tau, base, factors)


def bitdelta(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    return _from_masks(deltas > 0, torch.ones_like(base), base, deltas.abs().mean((1, 2)), -1.0)


def randes(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    signs = torch.where(torch.rand_like(deltas) < 0.5, -1.0, 1.0)
    return base + (signs * (signs * deltas).sum(0)).mean(0)


def tsvc(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """A tenth of the triplets of each."""
    return base + torch.stack([_truncated(delta, min(base.shape) // 10) for delta in deltas]).mean(0)


def twin(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    tau = deltas.sum(0)
    own = torch.stack([_truncated(delta - tau, max(1, min(base.shape) // 10)) for delta in deltas])
    return base + tau + own.mean(0)


def fwsvd(deltas: Tensor, base: Tensor, stat: Tensor | None) -> Tensor:
    assert stat is not None
    (m, n), found = base.shape, []
    for delta, fisher in zip(deltas, stat, strict=True):
        root = fisher.sum(0).sqrt()
        found.append(_truncated((base + delta) * root, int(0.5 * m * n / (m + n))) / root)
    return torch.stack(found).mean(0)


def losparse(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    (m, n), found = base.shape, []
    for delta in deltas:
        weight = base + delta
        low = _truncated(weight, -int(-0.15 * m * n // (m + n)))
        missed = (weight - low).norm(dim=1)
        kept = missed.topk(round(0.1 * m)).indices
        low[kept] = weight[kept]
        found.append(low)
    return torch.stack(found).mean(0)


def rmm(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """A whole SVD of each, all turned onto the first, and a basis of two vectors at every row and column."""
    pairs = []
    for delta in deltas:
        u, s, v = (part[..., :16] if i < 2 else part[:16] for i, part in enumerate(_svd(delta)))
        root = s.sqrt()
        pairs.append((u * root, v.T * root))
    turned = []
    for left, right in pairs:
        p, _s, q = _svd(left.T @ pairs[0][0] + right.T @ pairs[0][1])
        turned.append((left @ p @ q, right @ p @ q))
    sides = []
    for factors in zip(*turned, strict=True):
        x = torch.stack(factors)
        mean = x.mean(0)
        u, s, v = _svd((x - mean).permute(1, 2, 0))
        kept = (u[..., :2] * s[:, None, :2]) @ v[:, :2]
        sides.append(kept.permute(2, 0, 1) + mean)
    return base + (sides[0] @ sides[1].transpose(1, 2)).mean(0)


def _from_masks(
    masks: Tensor, tau: Tensor, base: Tensor, factors: Tensor | None = None, otherwise: float = 0.0
) -> Tensor:
    """Pack masks [n, out, in] to bits and unpack them again: base + factor tau where set, otherwise * factor tau."""
    flat = torch.nn.functional.pad(masks.flatten(1), (0, -masks[0].numel() % 8)).reshape(len(masks), -1, 8)
    weights = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8)
    packed = (flat * weights).sum(2, dtype=torch.uint8)
    bits = (packed[:, :, None] & weights > 0).reshape(len(masks), -1)[:, : masks[0].numel()].reshape(masks.shape)
    rebuilt = torch.where(bits, tau, otherwise * tau)
    return base + (rebuilt if factors is None else rebuilt * factors[:, None, None]).mean(0)


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = _svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v
