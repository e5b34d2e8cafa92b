"""Angles and lengths of whole tensors, through their inner products.

Whatever is a linear combination of n vectors has its norms and angles in their n x n Gram matrix.  It is
measured in one streaming pass; the maths on it then costs nothing, however large the tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.lazy import torch
from weightsmith.method import Rows
from weightsmith.ops.reduce import pairwise_sum, row_sums
from weightsmith.site import Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arc_shares", "cosines", "last_axis", "measure", "products", "square"]

PARALLEL = 1 - 5e-13
"""|cosine| from which on float64 cannot tell two vectors from parallel ones."""


def measure(vectors: Tensor | Sequence[Tensor]) -> dict[str, Tensor | Rows]:
    """Observe a block of n vectors, [n, *block]: their inner products row by row, for every pair i <= j."""
    return {"gram.products": Rows(torch.stack([row_sums(a.double() * b) for a, b in _pairs(vectors)]).cpu())}


def products(totals: Summary) -> dict[str, Any]:
    """From what was measured: 'gram' [n, n], float64."""
    return {"gram": square(pairwise_sum(totals["gram.products"]))}


def square(pairs: Tensor) -> Tensor:
    """The symmetric matrix of values for the pairs i <= j, in the order of `measure`: [n (n+1) / 2] -> [n, n]."""
    n = math.isqrt(2 * pairs.shape[0])
    rows, columns = torch.triu_indices(n, n)
    gram = pairs.new_zeros(n, n)
    gram[rows, columns] = pairs
    gram[columns, rows] = pairs
    return gram


def last_axis(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the slices along the last axis: [*, m] twice -> float64 [*]."""
    return pairwise_sum(a.double() * b)


def cosines(gram: Tensor) -> Tensor:
    """Cosines of all pairs, within [-1, 1]: [n, n].  A vector of zeros stands at a right angle to everything."""
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return (gram * inverse[:, None] * inverse[None, :]).clamp(-1, 1)


def arc_shares(aa: Any, bb: Any, ab: Any, t: float, straight: float = PARALLEL) -> tuple[Any, Any]:
    """The factors of a and b at the place t of the arc between them: (sin((1-t) h), sin(t h)) / sin h.

    aa, bb, ab  squared lengths and inner products, float64 of any shape, tensors or numpy arrays; h is the angle
    straight    |cos h| above which the factors are 1-t and t
    """
    of: Any = np if isinstance(aa, (np.ndarray, np.generic)) else torch
    lengths = of.sqrt(aa) * of.sqrt(bb)  # two roots: the product of the squares may underflow
    cosine = of.where(lengths > 0, ab / of.where(lengths > 0, lengths, 1.0), 0.0)
    line = of.abs(cosine) > straight
    angle = of.arccos(of.where(line, 0.0, cosine))
    first, second = (of.sin(share * angle) / of.sin(angle) for share in (1 - t, t))
    return of.where(line, 1 - t, first), of.where(line, t, second)


def _pairs(vectors: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    found = list(vectors)
    return [(found[i], found[j]) for i in range(len(found)) for j in range(i, len(found))]
