"""Angles and lengths of whole tensors, through their inner products.

Whatever is a linear combination of n vectors has its norms and angles in their n x n Gram matrix.  It is
measured in one streaming pass; the maths on it then costs nothing, however large the tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.kernel import Mix
from weightsmith.core.lazy import torch
from weightsmith.core.method import Rows
from weightsmith.core.site import Site, Summary
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_products

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arc_shares", "cosines", "last_axis", "measure", "mixed", "products", "square"]

PARALLEL = 1 - 5e-13
"""|cosine| from which on float64 cannot tell two vectors from parallel ones."""


def measure(spec: Mix, site: Site) -> dict[str, Tensor | Rows]:
    """Observe a block: the inner products of what is mixed, row by row, for every pair i <= j."""
    return {"gram.products": Rows(row_products(_vectors(spec, site)).cpu())}


def products(totals: Summary) -> np.ndarray:
    """From what was measured: the Gram matrix [n, n], float64."""
    return square(pairwise_sum(np.asarray(totals["gram.products"])))


def mixed(spec: Mix, site: Site) -> Tensor:
    """The mixture by the shares found, `mix.shares` [n]: the meaning of the fused kernels in `ops.fused`."""
    merged = weighted_sum(_vectors(spec, site), [float(share) for share in site.summary["mix.shares"]])
    return site.base + merged if spec.deltas and site.base is not None else merged


def _vectors(spec: Mix, site: Site) -> Sequence[Tensor]:
    if site.base is None:
        return site.experts.unbind()
    if spec.ends:
        return (site.base, *site.experts)
    return (site.deltas if spec.deltas else site.experts).unbind()


def square(pairs: np.ndarray) -> np.ndarray:
    """The symmetric matrix of values for the pairs i <= j, row after row: [n (n+1) / 2] -> [n, n]."""
    n = math.isqrt(2 * pairs.shape[0])
    rows, columns = np.triu_indices(n)
    gram = np.zeros((n, n))
    gram[rows, columns] = gram[columns, rows] = pairs
    return gram


def last_axis(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the slices along the last axis: [*, m] twice -> float64 [*]."""
    return pairwise_sum(a.double() * b)


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines of all pairs, within [-1, 1]: [n, n].  A vector of zeros stands at a right angle to everything."""
    norms = np.sqrt(gram.diagonal())
    inverse = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1.0), 0.0)
    return (gram * inverse[:, None] * inverse[None, :]).clip(-1, 1)


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
