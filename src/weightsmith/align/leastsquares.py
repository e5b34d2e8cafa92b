"""The second half of PLeaS: weights of a partly merged layer by least squares on what both models' layers do.

Inputs and outputs are those of the two *original* models, so layers do not depend on each other.  Only sums are kept,
never the rows: X'X [in, in] and X'Y [in, out] in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weightsmith.align.partial import Split
from weightsmith.core.errors import NumericError
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fit", "Mode", "Normal"]

Mode = Literal["averaged", "separate"]
"""What the regression sees.  averaged: one row per token, merged units as means of both models'.  separate: a row for
each model, with zeros for the other's separate units."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted layer.

    weight  [out, in] and bias [out], in the layout of `partial.Split`: separate units of different models do not see
            each other
    rank    of the inputs, where there were fewer rows than columns, or dependent ones; None where it is full
    """

    weight: Tensor
    bias: Tensor
    rank: int | None


class Normal:
    """Sums for one linear layer; rows, columns: how its outputs and inputs are split, None where they are not."""

    def __init__(self, rows: Split | None, columns: Split | None, mode: Mode = "averaged") -> None:
        self.rows, self.columns, self.mode = rows, columns, mode
        self.count = 0
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._square: Tensor | None = None

    def add(self, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        """Take in a batch: [tokens, in] and [tokens, out] of both models, in their own orders of units.

        Convolutions come as patches (`torch.nn.functional.unfold`).
        """
        x = _laid_out(inputs, self.columns, self.mode)
        y = _laid_out(outputs, self.rows, self.mode)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)  # the bias
        if self._gram is None or self._cross is None or self._square is None:
            self._gram = x.new_zeros(x.shape[1], x.shape[1])
            self._cross = x.new_zeros(x.shape[1], y.shape[1])
            self._square = x.new_zeros(y.shape[1])
        self._gram += x.T @ x
        self._cross += x.T @ y
        self._square += y.square().sum(0)
        self.count += len(x)

    def solve(self, ridge: float = 1e-6, bias: bool = True) -> Fit:
        """The weights with the smallest squared error; `ridge` times the mean diagonal is added to the Gram matrix.

        At most three Cholesky factorisations: merged outputs read all inputs, those of one model the merged ones and
        their own.  Raises NumericError where nothing was added, or what was is no number.
        """
        gram, cross = self._sums()
        if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            raise NumericError("inputs or outputs of a layer hold NaN or Inf; nothing can be fitted to them")
        found = torch.zeros_like(cross)
        last = gram.shape[0] - 1
        for outputs, allowed in _blocks(self.rows, self.columns, cross.shape[1], last):
            if len(outputs):
                used = torch.cat([allowed, torch.tensor([last])]) if bias else allowed
                part = gram[used][:, used]
                part = part + ridge * part.diagonal().mean() * torch.eye(len(used), dtype=part.dtype)
                factor = torch.linalg.cholesky(part)
                found[used[:, None], outputs] = torch.cholesky_solve(cross[used][:, outputs], factor)
        rank = int(torch.linalg.matrix_rank(gram, hermitian=True))
        return Fit(found[:-1].T.contiguous(), found[-1].clone(), None if rank > last else rank)

    def loss(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """Mean squared error per row of any weights of the layer's shape, on what was added."""
        gram, cross = self._sums()
        assert self._square is not None
        shift = torch.zeros(len(weight)) if bias is None else bias
        w = torch.cat([weight.double(), shift.double()[:, None]], dim=1)
        error = ((w @ gram) * w).sum() - 2 * (w * cross.T).sum() + self._square.sum()
        return max(float(error), 0.0) / self.count

    def _sums(self) -> tuple[Tensor, Tensor]:
        if self._gram is None or self._cross is None:
            raise NumericError("nothing was added to fit a layer to")
        return self._gram, self._cross


def _laid_out(sides: tuple[Tensor, Tensor], split: Split | None, mode: Mode) -> Tensor:
    """Both models' units side by side: [tokens, width] float64, or twice as many rows in `separate` mode."""
    first, second = (side.double() for side in sides)
    if split is None:
        return (first + second) / 2 if mode == "averaged" else torch.cat([first, second])
    merged = [side[:, torch.from_numpy(split.merged[i])] for i, side in enumerate((first, second))]
    own = [side[:, torch.from_numpy(split.separate[i])] for i, side in enumerate((first, second))]
    if mode == "averaged":
        return torch.cat([(merged[0] + merged[1]) / 2, *own], dim=1)
    upper = torch.cat([merged[0], own[0], torch.zeros_like(own[1])], dim=1)
    return torch.cat([upper, torch.cat([merged[1], torch.zeros_like(own[0]), own[1]], dim=1)])


def _blocks(rows: Split | None, columns: Split | None, outputs: int, inputs: int) -> list[tuple[Tensor, Tensor]]:
    """(outputs, inputs that they may read): of merged outputs, and of each model's separate ones."""
    shared = torch.arange(inputs)
    if rows is None:
        return [(torch.arange(outputs), shared)]
    k, m = rows.merged.shape[1], rows.separate.shape[1]
    both = inputs if columns is None else columns.merged.shape[1]
    apart = 0 if columns is None else columns.separate.shape[1]
    own = [torch.cat([shared[:both], shared[both + i * apart : both + (i + 1) * apart]]) for i in (0, 1)]
    return [(torch.arange(k), shared), *((torch.arange(k + i * m, k + (i + 1) * m), own[i]) for i in (0, 1))]
