"""Angles and lengths of whole tensors, through their inner products.

Whatever is a linear combination of n vectors has its norms and angles in their n x n Gram matrix.  It is
measured in one streaming pass; the maths on it then costs nothing, however large the tensors are.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weightsmith.core import kernel
from weightsmith.core.kernel import Mix
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Method
from weightsmith.core.parameter import is_tensor, traced
from weightsmith.core.pass_ import Pass, Rows, State
from weightsmith.core.site import Site
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_products

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mixture", "Products", "Shares", "arc_shares", "cosines", "last_axis", "square", "vector"]

PARALLEL = 1 - 5e-13
"""|cosine| from which on float64 cannot tell two vectors from parallel ones."""


@dataclass(frozen=True)
class Mixture(Method):
    """A method that is a linear combination by shares that the inputs' inner products tell, tensor by tensor."""

    mix: ClassVar[Mix]

    @abstractmethod
    def shares(self, products: Any) -> Any:
        """From the Gram matrix of what is mixed, [n, n] float64, the share of each: [n].

        An array; where a parameter is a tensor, in the gradient pass, a tensor of a tensor.
        """

    def sliced(self, key: Key) -> bool:
        """Whether a tensor is merged slice by slice, without shares, by `by_slice`."""
        return False

    def by_slice(self, site: Site) -> Tensor:
        raise NotImplementedError

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return (Shares(self), Products(self)) if traced(self) else (Shares(self),)

    def fused(self, count: int) -> Mix | None:
        return replace(self.mix, shares=Shares(self))

    def merge(self, site: Site) -> Tensor:
        if self.sliced(site.key):
            return self.by_slice(site)
        # Python floats: the sum is then float32 times a scalar, as in the kernels.
        shares: Any = [float(share) for share in site.result(Shares(self))]
        if any(map(is_tensor, traced(self))):
            # The gradient pass needs the shares as a function of the parameters: the same products, through torch.
            shares = self.shares(torch.from_numpy(site.result(Products(self))))
        merged = weighted_sum(_vectors(self.mix, site), shares)
        return site.base + merged if self.mix.deltas and site.base is not None else merged


@dataclass(frozen=True)
class Products(Pass[np.ndarray]):
    """All inner products of what a mixture mixes: [n, n] float64."""

    slope: ClassVar[str] = "own"

    mixture: Mixture

    def see(self, site: Site) -> State:
        return {"products": Rows(row_products(_vectors(self.mixture.mix, site)).cpu())}  # of every pair i <= j

    @property
    def seen(self) -> Hashable:
        # Products and Shares look alike: methods that mix the same vectors share one pass of a sweep.
        return Shares, self.mixture.mix

    def end(self, total: Mapping[str, Any]) -> np.ndarray:
        return square(pairwise_sum(np.asarray(total["products"])))

    def applies(self, key: Key) -> bool:
        return not self.mixture.sliced(key)

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Products(self.mixture.mix)


@dataclass(frozen=True)
class Shares(Products):
    """The shares of a mixture, from all inner products of what is mixed."""

    def end(self, total: Mapping[str, Any]) -> np.ndarray:
        products = super().end(total)
        if any(map(is_tensor, traced(self.mixture))):
            return np.asarray(self.mixture.shares(torch.from_numpy(products)).detach())
        return np.asarray(self.mixture.shares(products))


def _vectors(mix: Mix, site: Site) -> Sequence[Tensor]:
    if site.base is None:
        return site.experts.unbind()
    if mix.ends:
        # slerp: the base is one of the two ends
        return (site.base, *site.experts)
    return (site.deltas if mix.deltas else site.experts).unbind()


def vector(values: Sequence[Any]) -> Any:
    """Numbers as an array, or as a tensor where one of them is a tensor: float64 [n]."""
    if any(map(is_tensor, values)):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
    return np.array(values)


def square(pairs: np.ndarray) -> np.ndarray:
    """The symmetric matrix of values for the pairs i <= j, row after row: [n (n+1) / 2] -> [n, n]."""
    n = math.isqrt(2 * pairs.shape[0])  # n (n + 1) / 2 pairs: n^2 < 2 pairs < (n + 1)^2
    rows, columns = np.triu_indices(n)
    gram = np.zeros((n, n))
    gram[rows, columns] = gram[columns, rows] = pairs
    return gram


def last_axis(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the slices along the last axis: [*, m] twice -> float64 [*]."""
    # float64 before the product: squares of small weights vanish in float32.
    return pairwise_sum(a.double() * b)


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines of all pairs, within [-1, 1]: [n, n].  A vector of zeros stands at a right angle to everything."""
    norms = np.sqrt(gram.diagonal())  # [n]
    # The inner where keeps the division from a 0 that the outer one would discard anyway, with a warning.
    inverse = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1.0), 0.0)
    # Rounding may carry a cosine past 1, where arccos is NaN.
    return (gram * inverse[:, None] * inverse[None, :]).clip(-1, 1)


def arc_shares(aa: Any, bb: Any, ab: Any, t: float, straight: float = PARALLEL) -> tuple[Any, Any]:
    """The factors of a and b at the place t of the arc between them: (sin((1-t) h), sin(t h)) / sin h.

    aa, bb, ab  squared lengths and inner products, float64 of any shape, tensors or numpy arrays; h is the angle
    straight    |cos h| above which the factors are 1-t and t
    """
    of: Any = np if isinstance(aa, (np.ndarray, np.generic)) else torch
    lengths = of.sqrt(aa) * of.sqrt(bb)  # two roots: the product of the squares may underflow
    cosine = of.where(lengths > 0, ab / of.where(lengths > 0, lengths, 1.0), 0.0)
    # sin h goes to 0 with h: its quotient is noise first and NaN then.
    line = of.abs(cosine) > straight
    # Where the line is taken the angle is not used; a right angle (cosine 0) keeps its sine from being 0.
    angle = of.arccos(of.where(line, 0.0, cosine))
    first, second = (of.sin(share * angle) / of.sin(angle) for share in (1 - t, t))
    return of.where(line, 1 - t, first), of.where(line, t, second)
