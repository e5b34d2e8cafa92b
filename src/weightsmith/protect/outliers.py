"""Tensors of a model that are unlike those of other fine-tunes of the same base: a table, and no claim of safety.

Each rule compares one figure of the change delta = W - W_0 of a tensor with that of the other experts, or where there
are none with that of other layers.  The rules find what is strange; who wants to hide something can stay below them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from weightsmith.core.keys import role_of
from weightsmith.core.lazy import torch
from weightsmith.io.read.source import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CAVEAT", "RULES", "Outlier", "outliers"]

CAVEAT = (
    "these rules find what is unlike the others, and nothing else: an empty table does not say that a model is safe, "
    "and a line in it does not say that it is not"
)

RULES: Mapping[str, str] = {
    "norm": "its change, as a share of the weights and of the model's mean share, is over 3 times the others' largest",
    "spectrum": "one direction holds over half of its change, and twice as much as in the others",
    "signs": "fewer than 40% of the larger half of its changes have the sign of the others' sum, which agree on 55%",
    "rows": "8 rows of tokens hold over half of its change, and twice as much as in the others",
}
"""What makes a line of the table."""

_ROWS = 8
_TIMES = 3.0
_STEPS = 12  # of the power iteration: the share of a direction that stands out is found in a few


@dataclass(frozen=True)
class Outlier:
    """A tensor that a rule names: the figure here, and the largest (of signs: the smallest) of the others."""

    tensor: str
    rule: str
    here: float
    others: float | None


@dataclass(frozen=True)
class _Figures:
    """Of one tensor of one model: |delta| / |W_0|, share of the largest direction, share of the 8 largest rows."""

    norm: float
    direction: float | None
    rows: float | None


def outliers(
    base: Source, model: Source, others: Mapping[str, Source], progress: Callable[[int, int], object] | None = None
) -> list[Outlier]:
    """The lines of the table, tensor by tensor; one tensor of all models is held at a time."""
    names = [n for n, k in base.keys.items() if k.floating and k.numel and _fits(model, base, n)]
    mine: dict[str, _Figures] = {}
    theirs: dict[str, list[_Figures]] = {}
    found: list[Outlier] = []
    for done, name in enumerate(names):
        start = base.read(name).double()
        change = model.read(name).double() - start
        rest = [other.read(name).double() - start for other in others.values() if _fits(other, base, name)]
        mine[name] = _figures(name, change, start)
        theirs[name] = [_figures(name, one, start) for one in rest]
        found += _signs(name, change, rest)
        if progress:
            progress(done + 1, len(names))
    found += _norms(mine, theirs)
    for name, own in mine.items():
        near = theirs[name] or _alike(name, mine)
        found += _share(name, "spectrum", own.direction, [one.direction for one in near])
        found += _share(name, "rows", own.rows, [one.rows for one in theirs[name]])
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda one: (order[one.tensor], list(RULES).index(one.rule)))


def _fits(source: Source, base: Source, name: str) -> bool:
    return name in source.keys and source.key(name).shape == base.key(name).shape


def _figures(name: str, change: Tensor, start: Tensor) -> _Figures:
    size = float(change.norm())
    norm = size / max(float(start.norm()), 1e-300)
    if not size or change.ndim != 2:
        return _Figures(norm, None, None)
    rows = None
    if role_of(name) in ("embed", "head") and change.shape[0] > 4 * _ROWS:
        squares = change.square().sum(1)
        rows = float(squares.topk(_ROWS).values.sum() / squares.sum())
    return _Figures(norm, _direction(change) if min(change.shape) > 4 else None, rows)


def _direction(change: Tensor) -> float:
    """sigma_1^2 / |delta|^2 by power iteration, from below."""
    x = torch.randn(change.shape[1], dtype=change.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(_STEPS):
        x = change.T @ (change @ x)
        x = x / x.norm().clamp(min=1e-300)
    return float((change @ x).square().sum() / change.square().sum())


def _alike(name: str, mine: Mapping[str, _Figures]) -> list[_Figures]:
    """The figures of the same tensor in other layers."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    return [own for other, own in mine.items() if other != name and re.sub(r"(?<=\.)\d+(?=\.)", "*", other) == pattern]


def _norms(mine: Mapping[str, _Figures], theirs: Mapping[str, Sequence[_Figures]]) -> Iterator[Outlier]:
    """Each model's norms by its own mean: a model that was trained longer is no outlier in all of its tensors."""
    count = max((len(near) for near in theirs.values()), default=0)
    means = [_mean([near[i].norm for near in theirs.values() if len(near) > i]) for i in range(count)]
    own_mean = _mean([own.norm for own in mine.values()])
    for name, own in mine.items():
        here = own.norm / own_mean if own_mean else 0.0
        near = [one.norm / mean for one, mean in zip(theirs[name], means, strict=False) if mean]
        if not near:
            layers = [one.norm / own_mean for one in _alike(name, mine)] if own_mean else []
            near = [median(layers)] if len(layers) > 1 else []
        if near and here > _TIMES * max(near) and here > 1e-6:
            yield Outlier(name, "norm", here, max(near))


def _mean(values: Sequence[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(math.fsum(value * value for value in values) / len(values)) if values else 0.0


def _share(name: str, rule: str, here: float | None, near: Sequence[float | None]) -> Iterator[Outlier]:
    known = [value for value in near if value is not None]
    if here is not None and here > 0.5 and here > 2 * max(known, default=0.0):
        yield Outlier(name, rule, here, max(known, default=None))


def _signs(name: str, change: Tensor, rest: Sequence[Tensor]) -> Iterator[Outlier]:
    if len(rest) < 2 or change.numel() < 64 or not bool(change.any()):
        return
    large = change.abs() >= change.abs().median()
    total = torch.stack(list(rest)).sum(0)
    here = float(((change * total)[large] > 0).double().mean())
    near = min(
        float(((one * (total - one)) > 0).double().mean()) for one in rest
    )  # how far each of the others agrees with the sum of those beside it
    if here < 0.4 and near > 0.55:
        yield Outlier(name, "signs", here, near)
