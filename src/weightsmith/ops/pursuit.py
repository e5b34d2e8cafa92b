"""Orthogonal matching pursuit of many targets over one set of atoms, two ways that take the same atoms.

Directly, every step is one product of what is left of all targets with all atoms: any number of atoms, 2 n d operations
for a step of a target.  With the atoms' inner products at hand (Rubinstein, Zibulevsky and Elad, "Efficient
Implementation of the K-SVD Algorithm using Batch Orthogonal Matching Pursuit", 2008) a step t costs 2 n t, and what it
reads stays in the processor's cache: 8 to 15 times less at d = 1024.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRAM", "inner_products", "omp"]

_TINY = 1e-8
_DEPENDENT = 1e-12
"""Share of an atom's square that has to be left of it, beside the atoms before, for a coefficient of its own."""
_BLOCK = 2048
"""Rows of the inner products at a time."""
_FITS = 64
"""Targets that are fitted together."""

GRAM = range(2048, 32_769)
"""Numbers of atoms whose inner products are worth keeping: below, the kernel's compilation takes longer; above, the
table is larger than 4 GB."""


def omp(targets: Tensor, atoms: Tensor, k: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: (indices int64, coefficients float64) [b, k] of the atoms whose sum comes near
    each target [b, d] float32.

    Greedy: the atom [n, d] (not normalised) with the largest inner product with what is left is taken, then all
    coefficients are those of the least-squares fit (Pati, Rezaiifar and Krishnaprasad 1993; on embeddings:
    arXiv 2506.06607).

    gram   `inner_products(atoms)`, which makes it faster
    """
    taken = _taken(targets, atoms, k) if gram is None else _taken_by_gram(targets, atoms, k, gram)
    fits = [_fitted(targets[i : i + _FITS], atoms, taken[i : i + _FITS]) for i in range(0, len(taken), _FITS)]
    return taken, torch.cat(fits)


def inner_products(atoms: Tensor) -> Tensor:
    """The inner products of all pairs of atoms [n, d]: [n, n] float32."""
    out = torch.empty(len(atoms), len(atoms))
    for low in range(0, len(atoms), _BLOCK):
        torch.mm(atoms[low : low + _BLOCK], atoms.T, out=out[low : low + _BLOCK])
    return out


def _taken(targets: Tensor, atoms: Tensor, k: int) -> Tensor:
    """Atoms are made orthogonal twice over, so that float32 does for any k."""
    count, size = targets.shape
    left = targets.clone()  # [b, d]
    span = targets.new_zeros(count, k, size)  # orthonormal rows
    taken = torch.zeros(count, k, dtype=torch.long)
    free = torch.ones(count, len(atoms), dtype=torch.bool)
    each = torch.arange(count)
    for t in range(k):
        # [b, n]; an atom is taken once, so its place is marked with less than any |product|.
        chosen = (left @ atoms.T).abs().masked_fill_(~free, -1.0).argmax(dim=1)
        taken[:, t] = chosen
        free[each, chosen] = False
        atom = atoms[chosen]
        size_before = atom.norm(dim=1)
        # Once is not enough in float32: what is left of a nearly dependent atom is not orthogonal to the span (Kahan:
        # twice is).
        for _ in range(2):
            shares = (span[:, :t] @ atom.unsqueeze(2)).squeeze(2)
            atom = atom - (shares.unsqueeze(1) @ span[:, :t]).squeeze(1)
        norm = atom.norm(dim=1)  # [b]
        # A dependent atom adds no direction: 0 in the span, and the fit of all coefficients finds its share.
        new = norm > 1e-6 * size_before.clamp(min=_TINY)
        span[:, t] = torch.where(new.unsqueeze(1), atom / norm.clamp(min=_TINY).unsqueeze(1), 0.0)
        left = left - (span[:, t] * left).sum(dim=1, keepdim=True) * span[:, t]
    return taken


def _taken_by_gram(targets: Tensor, atoms: Tensor, k: int, gram: Tensor) -> Tensor:
    """What every atom has in common with the targets, and with each new direction, is carried along (float32)."""
    # [b, n], used up
    match = (targets @ atoms.T).numpy()
    taken = np.zeros((len(targets), k), np.int64)
    _kernel()(gram.numpy(), match, taken, np.empty((k, len(atoms)), np.float32))
    return torch.from_numpy(taken)


def _fitted(targets: Tensor, atoms: Tensor, taken: Tensor) -> Tensor:
    """Least squares in float64: through the inner products, or, where atoms depend on each other, the smallest of all
    fits."""
    chosen, goals = atoms[taken].double(), targets.double().unsqueeze(2)  # [b, k, d], [b, d, 1]
    # [b, k, k].  float64: the condition number of the atoms is squared.
    products = chosen @ chosen.transpose(1, 2)
    factor, failed = torch.linalg.cholesky_ex(products)
    # What is left of an atom beside those before it is the square of the Cholesky diagonal: 0 means dependent.
    left = factor.diagonal(dim1=1, dim2=2).square() / products.diagonal(dim1=1, dim2=2).clamp(min=_TINY**2)
    found: Tensor = torch.cholesky_solve(chosen @ goals, factor).squeeze(2)
    bad = (failed > 0) | ~(left.amin(dim=1) > _DEPENDENT)
    if bad.any():
        columns = chosen[bad].transpose(1, 2)
        # gelsd: the least of all solutions, by an SVD.
        found[bad] = torch.linalg.lstsq(columns, goals[bad], driver="gelsd").solution.squeeze(2)
    return found


@functools.cache
def _kernel() -> Any:
    """Compiled when it is first needed, in about three seconds."""
    from numba import njit

    return njit(_pursue, nogil=True, error_model="numpy", boundscheck=False)


_STRIP = 2048  # float32 numbers that stay in the nearest cache


def _pursue(gram: Any, match: Any, taken: Any, shared: Any) -> None:
    """Fill in `taken` [b, k].

    match   [b, n]: every atom with what is left of a target; is used up
    shared  [k, n], scratch: every atom with each direction of a target's orthonormal basis

    With atom i taken as the t-th, r_j = shared[j, i] are its coordinates in the basis so far, and its new direction q
    has  <q, .> = (gram[i] - sum_j r_j shared[j]) / |rest of atom i|.
    """
    count, k = taken.shape
    n = gram.shape[0]
    r = np.empty(k, np.float32)
    free = np.empty(n, np.float32)
    for b in range(count):
        free[:] = 1.0
        best = int(np.argmax(np.abs(match[b])))
        for t in range(k):
            i = best
            taken[b, t] = i
            free[i] = 0.0
            # float64: what is left of a nearly dependent atom is a small difference.
            rest = np.float64(gram[i, i])
            for j in range(t):
                r[j] = shared[j, i]
                rest -= np.float64(r[j]) * np.float64(r[j])
            # An atom in the span of those before has no new direction.
            inverse = np.float32(1.0 / np.sqrt(rest)) if rest > 1e-6 * gram[i, i] else np.float32(0.0)
            step = match[b, i] * inverse
            top = np.float32(-1.0)
            # All k + 2 rows of a strip stay in the cache: one way over memory per step, not t.
            for low in range(0, n, _STRIP):
                high = min(low + _STRIP, n)
                new, left, open_ = shared[t, low:high], match[b, low:high], free[low:high]
                new[:] = gram[i, low:high]
                j = 0
                while j + 4 <= t:  # four at a time: fewer ways to and from the cache
                    r0, r1, r2, r3 = r[j], r[j + 1], r[j + 2], r[j + 3]
                    s0, s1 = shared[j, low:high], shared[j + 1, low:high]
                    s2, s3 = shared[j + 2, low:high], shared[j + 3, low:high]
                    for x in range(high - low):
                        new[x] = new[x] - r0 * s0[x] - r1 * s1[x] - r2 * s2[x] - r3 * s3[x]
                    j += 4
                while j < t:
                    rj, sj = r[j], shared[j, low:high]
                    for x in range(high - low):
                        new[x] -= rj * sj[x]
                    j += 1
                most = np.float32(-1.0)
                for x in range(high - low):
                    new[x] *= inverse
                    left[x] -= step * new[x]
                    most = max(most, abs(left[x]) * open_[x])
                if most > top:
                    for x in range(high - low):
                        if open_[x] > 0 and abs(left[x]) == most:
                            # The first of equals, as argmax has it.
                            top, best = most, low + x
                            break
