"""The interference of a merged task vector with those of the tasks: a quadratic, kept as Gram matrices.

    L(M) = sum_i |(M - T_i) R_i^T|_F^2 / |tau_i|_F^2          M, T_i: [m, n]; R_i: [r_i, n]

The rows of R_i stand for the inputs of task i ("Whoever Started the Interference Should End It",
arXiv:2503.08099).  With B the rows of all R_i / |tau_i| on top of each other, [r, n], C = B^T B and the start M0

    gradient at M0 + X  =  2 (X C - E)      E = sum_i (T_i - M0) R_i^T R_i / |tau_i|^2 = F B

so that a step costs one product with C, not two per task.  Every method that only filters the spectrum of C
(gradient descent with momentum, gradient flow, truncation, the minimiser) ends at X = E h(C) = F h(B B^T) B for
some function h of the eigenvalues.  Whichever is the smaller of C and B B^T is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch
from weightsmith.ops.combine import mean, weighted_sum
from weightsmith.ops.leading import LARGE, eigh
from weightsmith.ops.leading import gram as square_of
from weightsmith.ops.reduce import block_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STARTS", "Interference", "flowed", "frobenius", "interference", "start_of"]

WEAK = 1e-4
"""Eigenvalues of a float32 Gram matrix, relative to the largest, below which float64 takes over."""

STARTS = ("sum", "mean", "zero")
"""Words for M0."""


@dataclass(frozen=True, eq=False)
class Interference:
    """The quadratic around a start M0, float64 (or float32, see `interference`).

    pull    F [m, r]; E [m, n] where `rows` is None
    gram    B B^T [r, r]; C [n, n] where `rows` is None
    rows    B [r, n], or None
    """

    pull: Tensor
    gram: Tensor
    rows: Tensor | None

    def gradient(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The function X -> gradient of L at M0 + X, computed in `dtype`."""
        # The factor 2 of the gradient goes into the constants: once, not at every step.
        pull, gram = (2 * t.detach().to(dtype) for t in (self.pull, self.gram))
        if self.rows is None:
            # 2 (X C - E)
            return lambda x: torch.addmm(pull, x, gram, beta=-1)
        rows = self.rows.to(dtype)
        # 2 (X B^T - F) B: [m, r] in between, less than [n, n] as long as 2 r < n.
        return lambda x: torch.addmm(pull, x, rows.T, beta=-1, alpha=2) @ rows

    def filtered(self, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """X = E h(C), [m, n]; `gain`, h, gets the eigenvalues >= 0 of `gram`, rising, float64: [k] -> [k].

        The n - k eigenvalues of C that `gram` does not have are zero, and so is E in their directions.
        """
        values, vectors = eigh(self.gram.detach())
        # A Gram matrix has no negative eigenvalues; rounding makes some.
        gains = gain(values.double().clamp(min=0))
        used = values[gains != 0]
        if values.dtype == torch.float32 and len(used) and used.amin() < WEAK * values[-1]:
            # The gain of an eigenvalue l is about 1 / l: where weak ones take part, their rounding noise would be
            # magnified.
            values, vectors = eigh(self.gram.detach().double())
            gains = gain(values.clamp(min=0))
        # F V h(L) V^T, without the [r, r] (or [n, n]) matrix h(B B^T).
        moved = ((self.pull.to(vectors.dtype) @ vectors) * gains.to(vectors.dtype)) @ vectors.T
        return moved if self.rows is None else moved @ self.rows.to(moved.dtype)


def interference(
    start: Tensor,
    tasks: Iterable[tuple[Tensor, Tensor, Tensor]],
    rows: int,
    *,
    loop: bool = False,
    dtype: torch.dtype | None = None,
) -> Interference:
    """Sum up the tasks, each (T_i [m, n], R_i [r_i, n], |tau_i|); a task of norm 0 has no say.

    start   M0 [m, n]
    rows    the largest sum of all r_i, to choose the cheaper form by
    loop    for `gradient` (two products with B against one with C) rather than for `filtered`
    dtype   of the result, by default float64

    Gradients reach T_i and M0; R_i and |tau_i| count as constants.
    """
    m, n = start.shape
    dtype = dtype or torch.float64
    # The cheaper form: B B^T is [r, r] and C [n, n]; a step with B takes two products instead of one.
    stacked = rows * (2 if loop else 1) < n
    pull = start.new_zeros(m, 0 if stacked else n, dtype=dtype)  # F [m, 0], to be widened; or E [m, n]
    gram = start.new_zeros(n, n, dtype=dtype) if not stacked else None
    parts = []
    for target, projector, norm in tasks:
        # A task that changed nothing has no inputs to disturb, and 0 / 0 for a weight.
        if norm == 0:
            continue
        b = _copied(projector.detach(), dtype).div_(norm.to(dtype))  # [r_i, n]: R_i / |tau_i|
        if gram is None:
            pull = torch.cat([pull, _missed(target, start, dtype) @ b.T], 1)  # F_i = (T_i - M0) B_i^T: [m, r_i]
            parts.append(b)
        elif 2 * b.shape[0] < n:
            # Two thin products cost 4 m n r_i, one with the [n, n] Gram matrix 2 m n^2.
            gram.addmm_(b.T, b)
            pull = pull.add_((_missed(target, start, dtype) @ b.T) @ b)
        else:
            own = square_of(b.T)
            gram.add_(own)
            del b  # float64 matrices, that the next task needs room for
            pull = pull.add_(_missed(target, start, dtype) @ own)
            del own
    if gram is not None:
        return Interference(pull, gram, None)
    # The empty block gives a shape where no task is left.
    all_rows = torch.cat([start.new_zeros(0, n, dtype=dtype), *parts])
    return Interference(pull, square_of(all_rows), all_rows)


def _copied(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, nobody else's."""
    return matrix.to(dtype, copy=True)


def _missed(target: Tensor, start: Tensor, dtype: torch.dtype) -> Tensor:
    """T - M0 in this dtype."""
    return _copied(target, dtype).sub_(start)


def frobenius(delta: Tensor) -> Tensor:
    """|tau|_F, a float64 scalar and a constant to gradients."""
    return block_squares(delta.detach()).sqrt()


def start_of(deltas: Tensor, word: str) -> Tensor:
    """M0 by its word: [n, *block] -> [*block]."""
    if word == "zero":
        return torch.zeros_like(deltas[0])
    return weighted_sum(deltas) if word == "sum" else mean(deltas)


def flowed(deltas: Tensor, start: str, time: float, floor: float, count: Callable[[Tensor], int]) -> Tensor:
    """M after gradient flow on the loss of T_i = R_i = tau_i for `time`, in C's leading eigenvectors: [m, n].

    floor   eigenvalues below it count as it
    count   all n eigenvalues of C, falling and floored -> how many take part

    Of float32 matrices with 256 or more rows and columns it is computed in float32: 1e-5 of what M moves by off (as
    float32 task vectors of models are themselves), 1e-4 where eigenvalues down to 1e-4 of the largest take part.
    """
    origin, columns = start_of(deltas, start), deltas.shape[2]
    tasks = ((delta, delta, frobenius(delta)) for delta in deltas)
    large = deltas.dtype == torch.float32 and min(deltas.shape[1:]) >= LARGE and not deltas.requires_grad
    dtype = torch.float32 if large else torch.float64
    loss = interference(origin, tasks, deltas.shape[0] * deltas.shape[1], dtype=dtype)

    def gain(values: Tensor) -> Tensor:
        safe = values.clamp(min=floor)
        # `gram` may be B B^T: the eigenvalues of C that it lacks are 0, and count as the floor.
        padding = safe.new_full((columns - len(safe),), floor)
        used = min(count(torch.cat([padding, safe]).flip(0)), len(safe))
        # h(l) = (1 - exp(-l time)) / l: D f / l - M0 f of the papers is (D - M0 C) f / l = E h.
        # expm1: 1 - exp(-x) of a small x would be rounding only.
        gain = -torch.expm1(-safe * time) / safe
        # Rising order: the leading `used` come last.
        gain[: len(safe) - used] = 0
        return gain

    return origin + loss.filtered(gain).to(deltas.dtype)
