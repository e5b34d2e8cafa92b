"""Two models tensor by tensor, streaming, with sums that do not depend on blocks or threads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.keys import Key, layer_of, role_of
from weightsmith.core.lazy import torch
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.task import blocks
from weightsmith.engine.stream import each_tensor
from weightsmith.io.read.source import Source, bits_to_tensor
from weightsmith.ops.reduce import pairwise_sum, row_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Change", "Sums", "compare_tensors", "gathered"]


@dataclass(frozen=True)
class Sums:
    """Sums over entries, in float64: of a^2, b^2, (b - a)^2 and a b; what is largest, and how many differ.

    Several tensors count as one long vector: `gathered` adds their sums up.
    """

    a2: float = 0.0
    b2: float = 0.0
    d2: float = 0.0
    ab: float = 0.0
    max_abs: float = 0.0
    changed: int = 0
    numel: int = 0

    @property
    def relative(self) -> float:
        """|b - a| / |a|, L2 norms; inf where only a is zero."""
        return math.sqrt(self.d2 / self.a2) if self.a2 else (math.inf if self.d2 else 0.0)

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b; None where one is zero."""
        size = math.sqrt(self.a2) * math.sqrt(self.b2)
        return max(-1.0, min(1.0, self.ab / size)) if size else None


@dataclass(frozen=True)
class Change:
    """One tensor that both models have in one shape.

    dtypes  as the two store it; unlike dtypes are told, and count as a difference of their own
    same    every value is equal (NaN equals NaN)
    sums    None for tensors of integers or booleans, whose entries are only counted
    changed entries that are not equal
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    changed: int
    sums: Sums | None

    @property
    def same(self) -> bool:
        return not self.changed

    @property
    def layer(self) -> str:
        """The block's name ('model.layers.3'), or '' outside the blocks."""
        place = layer_of(self.name)
        return "" if place is None else f"{place[0]}.{place[1]}"

    @property
    def role(self) -> str:
        return role_of(self.name)


def compare_tensors(a: Source, b: Source, names: Sequence[str], settings: Settings = DEFAULT) -> list[Change]:
    """The changes of some tensors that both have in one shape, in the order of `names`."""
    keys = [Key(name, a.key(name).shape, a.key(name).dtype) for name in names]
    found = each_tensor(keys, lambda key: _change(a, b, key.name), settings)
    return [found[name] for name in names]


def gathered(changes: Iterable[Change]) -> Sums:
    """The sums of several tensors as one vector; tensors of integers are left out."""
    return _added([change.sums for change in changes if change.sums is not None])


def _added(parts: Sequence[Sums]) -> Sums:
    a2, b2, d2, ab = (math.fsum(getattr(p, name) for p in parts) for name in ("a2", "b2", "d2", "ab"))
    largest = [p.max_abs for p in parts]
    top = math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0)
    return Sums(a2, b2, d2, ab, top, sum(p.changed for p in parts), sum(p.numel for p in parts))


def _change(a: Source, b: Source, name: str) -> Change:
    here, there = a.key(name), b.key(name)
    dtypes = (here.dtype, there.dtype)
    stored = here.dtype == there.dtype and not a.computes(name) and not b.computes(name)
    if not (here.floating and there.floating):
        changed = sum(_unequal(a, b, name, *rows) for rows in blocks(here, 0, here.rows)) if here.numel else 0
        return Change(name, here.shape, dtypes, changed, None)
    per_row: list[Tensor] = []
    largest, changed = [0.0], 0
    for start, stop in blocks(here, 0, here.rows) if here.numel else ():
        if stored and np.array_equal(one := a.bits(name, start, stop), b.bits(name, start, stop)):
            x = bits_to_tensor(one, here.dtype).double()
            y = x
        else:
            x, y = a.read(name, start, stop).double(), b.read(name, start, stop).double()
        d = y - x
        per_row.append(torch.stack([row_sums(x * x), row_sums(y * y), row_sums(d * d), row_sums(x * y)]))
        unlike = ~((x == y) | (x.isnan() & y.isnan()))
        changed += int(unlike.sum())
        if d.numel():
            largest.append(float(torch.where(unlike, d.abs(), 0.0).max()))
    a2, b2, d2, ab = pairwise_sum(torch.cat(per_row, 1)).tolist() if per_row else [0.0] * 4
    top = math.nan if any(map(math.isnan, largest)) else max(largest)
    return Change(name, here.shape, dtypes, changed, Sums(a2, b2, d2, ab, top, changed, here.numel))


def _unequal(a: Source, b: Source, name: str, start: int, stop: int) -> int:
    x, y = a.read(name, start, stop), b.read(name, start, stop)
    if x.dtype.is_floating_point or y.dtype.is_floating_point or "uint64" in (str(x.dtype), str(y.dtype)):
        return int((x.double() != y.double()).sum())
    return int((x.to(torch.int64) != y.to(torch.int64)).sum())
