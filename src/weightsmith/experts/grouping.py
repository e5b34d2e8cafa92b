"""Which experts of a mixture become one, and what it is: M-SMoE.

Source: "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy" (Li et al., ICLR 2024,
arXiv:2310.01334).  Statistics of the router decide; the weights are only averaged.  Left out: the paper's low-rank and
sparse compression of the result, which needs gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.lazy import torch
from weightsmith.ops.assign import best_pairing
from weightsmith.ops.assign import similarity as profit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EPSILON", "affinity", "budget", "cosines", "group", "merged", "shares", "unit_order"]

EPSILON = 1e-7
"""Added to the sum of usages, as the authors do."""


def affinity(vectors: Tensor) -> Tensor:
    """How alike experts are: (cosine + 1) / 2 of any vectors of theirs, [E, m] -> [E, E], the diagonal 1.

    The authors take each expert's router logits over the tokens of some text, or its weights.  Without a direction
    (all zero) an expert is as near to one as to another, 1/2.
    """
    wide = vectors.double()
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    unit = torch.where(norms > 0, wide / norms, 0.0)
    return ((unit @ unit.T + 1) / 2).clamp_(0, 1).fill_diagonal_(1)


def cosines(gram: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosines [E, E] of vectors with these inner products, the diagonal 1; 0 with a vector of length 0."""
    wide = np.asarray(gram, np.float64)
    norms = np.sqrt(np.clip(np.diag(wide), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = np.nan_to_num(wide / norms[:, None] / norms[None], nan=0.0, posinf=0.0, neginf=0.0)
    found = np.clip(found, -1, 1)
    np.fill_diagonal(found, 1)
    return found


def budget(usage: Sequence[NDArray[np.floating]], total: int, least: int = 1) -> list[int]:
    """How many groups each layer gets of `total`: the experts that are used most, whatever their layer.

    usage  a layer's share of the tokens that its router gives to each expert, [E] each
    least  groups that every layer has

    Each layer keeps its `least` most used experts (the authors: one).
    Of equal shares those of earlier layers, then of lower numbers, come first
    (the authors lose all that are equal at the threshold).
    """
    layers = len(usage)
    experts = sum(len(shares) for shares in usage)
    if not layers * least <= total <= experts:
        few = f"{layers * least} ({'one' if least == 1 else least} a layer)"
        raise WeightsmithError(f"{total} groups in all; expected {few} to {experts} (no merging)")
    found = [least] * layers
    rest = [
        (-float(share), layer, expert)
        for layer, shares in enumerate(usage)
        for expert, share in enumerate(shares)
        if expert not in np.argsort(-np.asarray(shares, np.float64), kind="stable")[:least]
    ]
    for _, layer, _ in sorted(rest)[: total - layers * least]:
        found[layer] += 1
    return found


def group(usage: NDArray[np.floating], alike: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The group of each expert of one layer: [E], numbered by falling usage of the experts that found them.

    usage  [E]; alike: [E, E], see `affinity`; count: number of groups

    The `count` most used experts found a group each; every other joins the one that it is most like, of equals the one
    that is used more.
    """
    if not 1 <= count <= len(usage):
        raise WeightsmithError(f"{count} groups of {len(usage)} experts; expected 1 to {len(usage)}")
    founders = np.argsort(-np.asarray(usage, np.float64), kind="stable")[:count]
    labels: NDArray[np.int64] = np.argmax(np.asarray(alike)[:, founders], axis=1).astype(np.int64)
    labels[founders] = np.arange(count)
    return labels


def merged(weights: Sequence[Tensor], usage: Sequence[float]) -> Tensor:
    """One matrix of a group's: sum_e u_e W_e / (sum_e u_e + 1e-7); unused ones give the plain mean, not zeros."""
    parts = shares(usage)
    out = weights[0] * parts[0]
    for weight, share in zip(weights[1:], parts[1:], strict=True):
        out = out + weight * share
    return out


def shares(usage: Sequence[float]) -> list[float]:
    """u_e / (sum_e u_e + 1e-7) of a group's experts; all the same where none is used."""
    total = sum(map(float, usage))
    return [float(u) / (total + EPSILON) for u in usage] if total > 0 else [1 / len(usage)] * len(usage)


def unit_order(
    reference: tuple[Sequence[Tensor], Sequence[Tensor]],
    moving: tuple[Sequence[Tensor], Sequence[Tensor]],
    outward: bool = True,
) -> Tensor:
    """The order of an expert's hidden units that comes nearest to another's: [units] int64.

    reference, moving  (matrices into the units [units, in], matrices out of them [out, units]); of a gated expert
                       (gate, up) and (down,)
    outward            whether the matrices out of the units count, too

    Rows of the first kind and columns of the second are taken in this order: W_in[order], W_out[:, order].  The
    function stays the same.
    """
    rows = [list(kinds[0]) + ([w.T for w in kinds[1]] if outward else []) for kinds in (reference, moving)]
    return best_pairing(profit(rows[0], rows[1]))
