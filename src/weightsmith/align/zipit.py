"""Merging by correlated features, within models too: ZipIt! (Stoica et al., ICLR 2024, arXiv:2305.03053).

The peer of partial merging: `align.partial` merges a unit of one model with one of the other, this any two units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Zip", "zipped", "zipped_weight"]


@dataclass(frozen=True, eq=False)
class Zip:
    """Which units became one.

    members  float32 [2 n, m]: 1 where a unit (those of model 1, then those of model 2) is part of a merged unit; every
             row has a single 1.  A merged unit is the mean of its members (M = members, columns divided by their sums),
             and stands for each of them (U = members)
    """

    members: np.ndarray

    @property
    def width(self) -> int:
        """Units in the result."""
        return int(self.members.shape[1])

    def sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """For each model the parts [n, m] of M and of U that belong to its units."""
        whole = torch.from_numpy(self.members)
        means = whole / whole.sum(0)
        n = len(whole) // 2
        return (means[:n], whole[:n]), (means[n:], whole[n:])


def zipped(correlation: np.ndarray, ratio: float = 0.5, *, repeat: float = 0.3, within: float = 0.125) -> Zip:
    """Merge the most correlated pair again and again until (1 - ratio) of all units are left.

    correlation  [2 n, 2 n] of the units of both models on the same inputs; NaN (a unit that never changes) counts as 0
    repeat       a merged unit's correlations are the smaller of its members' times this, so that few are merged often;
                 0 or less: a unit that holds units of both models is merged no more, and others are as before
    within       pairs inside one model that may be merged, as a share of its units
    The defaults are the published ones.  The released code charges the allowance to the model of another unit, the one
    that follows the removed one; here to the model of the two that are merged.  Of equal pairs the first is taken.
    Raises RecipeError for numbers outside 0 to 1, and where nothing is left that may be merged.
    """
    count = len(correlation)
    if correlation.shape != (count, count) or count % 2:
        raise RecipeError(f"correlations of both models' units are [2 n, 2 n], not {list(correlation.shape)}")
    if not (0 <= ratio <= 1 and 0 <= within <= 1 and repeat <= 1):
        raise RecipeError(f"ratio {ratio:g} and within {within:g} are between 0 and 1, and repeat {repeat:g} at most 1")
    if np.isinf(correlation).any():
        raise NumericError("correlations hold Inf")
    alike = np.nan_to_num(np.asarray(correlation, np.float64), nan=0.0)
    np.fill_diagonal(alike, -np.inf)
    members = np.eye(count, dtype=np.float32)
    n = count // 2
    own = np.repeat([0, 1], n)  # model of each merged unit's units, 2: of both
    left = [int(within * n + 1e-9)] * 2
    live = np.ones(count, bool)

    def forbid(model: int) -> None:
        inside = np.flatnonzero(own == model)
        alike[np.ix_(inside, inside)] = -np.inf

    for model in (0, 1):
        if not left[model]:
            forbid(model)
    for _ in range(count - max(1, int((1 - ratio) * count + 1e-9))):
        first, second = sorted(int(i) for i in divmod(int(alike.argmax()), count))
        if alike[first, second] == -np.inf:
            raise RecipeError(
                f"nothing is left to merge at {int(live.sum())} of {count} units: raise within ({within:g}) or repeat "
                f"({repeat:g}), or lower the ratio ({ratio:g})"
            )
        inside = own[first] == own[second] != 2
        members[:, first] += members[:, second]
        lowest = np.minimum(alike[first], alike[second])
        fewer = repeat * lowest if repeat > 0 else lowest if inside else np.full(count, -np.inf)
        alike[first], alike[:, first] = fewer, fewer
        alike[second], alike[:, second] = -np.inf, -np.inf
        alike[first, first] = -np.inf
        live[second] = False
        if inside:
            left[own[first]] -= 1
            if not left[own[first]]:
                forbid(int(own[first]))
        own[first] = own[first] if own[first] == own[second] else 2
        own[second] = 3
    return Zip(np.ascontiguousarray(members[:, live]))


def zipped_weight(first: Tensor, second: Tensor, rows: Zip | None = None, columns: Zip | None = None) -> Tensor:
    """The merged layer's weight [out, in] (or bias [out]): the sum over both models of M_out^T W U_in.

    rows, columns: how outputs and inputs are merged; None where an axis stays as it is in both, and is averaged.
    """
    parts = []
    for model, side in enumerate((first, second)):
        out = side / 2 if rows is None else rows.sides()[model][0].to(side.dtype).T @ side
        parts.append(out if columns is None or side.ndim == 1 else out @ columns.sides()[model][1].to(side.dtype))
    return parts[0] + parts[1]
