"""Partial merging: alike units of two models become one, the others stay side by side (PLeaS, arXiv:2407.02447).

An axis of n units with n - m of them merged has n + m in the result: [merged | separate of model 1 | of model 2].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.align.layout import Layout
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import SymmetryGroup
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.source import Source
from weightsmith.io.read.widened import widened_config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Split", "expanded", "flops", "ratio_for", "split", "wide_groups"]


@dataclass(frozen=True, eq=False)
class Split:
    """Which units of a group are merged.  Index vectors, int64; all follow the order of model 1's units.

    merged    [2, k]: unit merged[0, i] of model 1 with merged[1, i] of model 2
    separate  [2, m]: those that stay by themselves, k + m = n
    """

    merged: np.ndarray
    separate: np.ndarray

    @property
    def width(self) -> int:
        """Units in the result."""
        return int(self.merged.shape[1] + 2 * self.separate.shape[1])

    def slots(self, model: int) -> np.ndarray:
        """[n]: the place in the result of every unit of a model (0 or 1)."""
        k, m = self.merged.shape[1], self.separate.shape[1]
        found = np.empty(k + m, np.int64)
        found[self.merged[model]] = np.arange(k)
        found[self.separate[model]] = k + model * m + np.arange(m)
        return found


def split(profit: np.ndarray, order: np.ndarray, ratio: float) -> Split:
    """Keep the share `ratio` of the units apart: the pairs with the lowest profits, of equal ones the later.

    profit: [n, n] float; order: [n], the unit of model 2 that belongs to each of model 1.
    n - ceil(ratio (n - 1)) pairs are merged, none at ratio 1 (the reference still merges the best one there).
    """
    if not 0 <= ratio <= 1:
        raise RecipeError(f"the share of units that stay separate is between 0 and 1, not {ratio:g}")
    n = len(order)
    count = n - apart(n, ratio)
    gains = np.asarray(profit)[np.arange(n), order]
    together = np.zeros(n, bool)
    together[np.argsort(-gains, kind="stable")[:count]] = True
    pairs = np.stack([np.arange(n), np.asarray(order)])
    return Split(pairs[:, together], pairs[:, ~together])


def apart(units: int, ratio: float) -> int:
    """How many of a group's units stay separate."""
    return units if ratio == 1 else math.ceil(ratio * (units - 1))


def expanded(first: Tensor, second: Tensor, rows: Split | None = None, columns: Split | None = None, *,
             share: float = 0.5) -> Tensor:  # fmt: skip
    """The weight of the wider layer before least squares, from those of both models: [out, in], or [out] of a bias.

    rows, columns: how the outputs and inputs are split; None where the axis stays as it is.  What both models share is
    averaged, a separate unit reads the merged ones and its own, a merged one reads the `share` of each separate one,
    and separate units of different models do not see each other: exact zeros.  With a half, equal models stay what they
    were at every width; the reference takes 1 in its last layer, whose outputs are not split, and a half elsewhere.
    """
    sides = (first, second)
    if first.ndim == 1:
        return _vector(sides, rows)
    out = [_parts(rows, i, first.shape[0]) for i in (0, 1)]
    into = [_parts(columns, i, first.shape[1]) for i in (0, 1)]

    def block(model: int, row: int, column: int) -> Tensor:
        """Merged (0) or separate (1) rows and columns of one model."""
        return sides[model][out[model][row]][:, into[model][column]]

    zero = first.new_zeros(len(out[0][1]), len(into[0][1]), *first.shape[2:])
    grid = [
        [(block(0, 0, 0) + block(1, 0, 0)) / 2, share * block(0, 0, 1), share * block(1, 0, 1)],
        [block(0, 1, 0), block(0, 1, 1), zero],
        [block(1, 1, 0), zero, block(1, 1, 1)],
    ]
    return torch.cat([torch.cat(line, dim=1) for line in grid])


def _parts(split: Split | None, model: int, size: int) -> tuple[Tensor, Tensor]:
    if split is None:
        return torch.arange(size), torch.arange(0)
    return torch.from_numpy(split.merged[model]), torch.from_numpy(split.separate[model])


def _vector(sides: Sequence[Tensor], rows: Split | None) -> Tensor:
    (m1, s1), (m2, s2) = (_parts(rows, i, len(sides[0])) for i in (0, 1))
    return torch.cat([(sides[0][m1] + sides[1][m2]) / 2, sides[0][s1], sides[1][s2]])


# --- widths ----------------------------------------------------------------------------------------


def flops(layers: Iterable[tuple[float, float | None, float | None]]) -> float:
    """Operations of the wider network per operation of one model.

    layers: (operations, share of separate inputs, of separate outputs) of each; None where an axis does not grow.
    A layer with shares a and b takes (1 + a)(1 + b) - 2 a b of its own, as separate units do not see each other.
    """
    rows = list(layers)
    total = sum(cost for cost, _, _ in rows)
    grown = sum(cost * ((1 + (a or 0)) * (1 + (b or 0)) - 2 * (a or 0) * (b or 0)) for cost, a, b in rows)
    return grown / total if total else 1.0


def ratio_for(budget: float, cost: Callable[[float], float]) -> float:
    """The largest ratio common to all groups whose `cost` (operations per operation of one model) is within a budget.

    Bisection to 1e-6; cost must grow with the ratio.  Raises RecipeError for a budget below 1.
    """
    if budget < 1:
        raise RecipeError(f"a budget of {budget:g} is less than one model; give 1 to 2")
    low, high = 0.0, 1.0
    if cost(high) <= budget:
        return high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


# --- of a transformer ------------------------------------------------------------------------------


def wide_groups(source: Source, found: Layout, keep: float | None, budget: float | None) -> dict[str, float]:
    """Which groups a partial merge makes wider, each with its share of separate units; {} where none was asked for.

    The hidden units of all MLPs, by one share, as config.json has one field for their width.  Residual stream and
    heads stay merged.  Raises SourceError for models where that cannot be.
    """
    if keep is None and budget is None:
        return {}
    groups = [group for group in found.groups if group.kind == "mlp"]
    normed = [name for group in groups for name in group.names if source.key(name).role == "norm"]
    still = [name for name in found.frozen if name.endswith(".hidden")]
    experts = [group.name for group in found.groups if group.kind == "experts"]
    for names, why in ((normed, "is a norm over hidden units"), (still, "is frozen"), (experts, "has experts")):
        if names:
            raise SourceError(f"{source}: its MLPs cannot become wider together: {names[0]} {why}")
    text = config_of(source)
    if not groups or text is None:
        raise SourceError(f"{source}: no MLPs, or no config.json, that could become wider")
    widened_config(text, {(group.size, group.size + 1) for group in groups}, str(source))
    if keep is None:
        assert budget is not None
        size = groups[0].size
        keep = ratio_for(budget, lambda ratio: flops(_layers(source, groups, apart(size, ratio) / size)))
    return {group.name: keep for group in groups}


def _layers(
    source: Source, groups: Sequence[SymmetryGroup], ratio: float
) -> list[tuple[float, float | None, float | None]]:
    """Operations of every matrix that multiplies tokens, and by what its inputs and outputs grow."""
    reads = {group.axes[-1].name for group in groups}
    writes = {axis.name for group in groups for axis in group.axes[:-1]}
    return [
        (float(key.numel), ratio if name in reads else None, ratio if name in writes else None)
        for name, key in source.keys.items()
        if len(key.shape) == 2 and key.role != "embed"
    ]
