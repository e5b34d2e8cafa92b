"""How two models differ: tensor by tensor, streaming, with sums that do not depend on blocks or threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.keys import Key, layer_of, role_of
from weightsmith.core.lazy import torch
from weightsmith.core.settings import cores
from weightsmith.core.task import blocks
from weightsmith.engine.runner import SerialRunner, ThreadRunner, one_thread_each
from weightsmith.io.read.source import Source, bits_to_tensor
from weightsmith.ops.reduce import pairwise_sum, row_sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Change", "Difference", "Sums", "by_layer", "compare", "compare_tensors", "gathered"]


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


@dataclass(frozen=True)
class Difference:
    """Two models against each other.

    changes  tensors that both have in one shape, in the first one's order
    only_a   tensors of the first alone, with shape and dtype; `only_b` of the second
    shapes   tensors whose shapes differ: name, shape there, shape here
    """

    a: str
    b: str
    changes: tuple[Change, ...]
    only_a: tuple[Key, ...] = ()
    only_b: tuple[Key, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the models hold the same tensors with the same values in the same dtypes."""
        alone = self.only_a or self.only_b or self.shapes
        return not alone and all(c.same and c.dtypes[0] == c.dtypes[1] for c in self.changes)


def compare(
    a: Source,
    b: Source,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare all tensors of two models, block by block; `progress` is called with tensors (done, in all).

    A tied name stands for the tensor that holds its data, so tied and untied models of equal values are equal.
    """
    names = [*a.keys, *(name for name in a.aliases if name in b.keys)]
    both = [name for name in names if name in b.keys or name in b.aliases]
    fitting = [name for name in both if a.key(name).shape == b.key(name).shape]
    found = []
    for change in compare_tensors(a, b, fitting, threads=threads):
        found.append(change)
        if progress:
            progress(len(found), len(fitting))
    held = {*a.keys, *a.aliases}
    return Difference(
        a.origin.label,
        b.origin.label,
        tuple(found),
        tuple(key for name, key in a.keys.items() if name not in both),
        tuple(key for name, key in b.keys.items() if name not in held),
        tuple((n, a.key(n).shape, b.key(n).shape) for n in both if a.key(n).shape != b.key(n).shape),
    )


def compare_tensors(a: Source, b: Source, names: Sequence[str], *, threads: int | None = None) -> Iterable[Change]:
    """The changes of some tensors, in order, as they become known."""
    count = min(threads or cores(), max(len(names), 1))
    runner = ThreadRunner(count) if count > 1 else SerialRunner()
    with one_thread_each():
        yield from runner.map(partial(_change, a, b), names)


def gathered(changes: Iterable[Change]) -> Sums:
    """The sums of several tensors as one vector; tensors of integers are left out."""
    return _added([change.sums for change in changes if change.sums is not None])


def by_layer(changes: Iterable[Change]) -> dict[str, Sums]:
    """Block -> the sums of its tensors, in order of appearance; '' is all that lies outside the blocks."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.layer, []).append(change)
    return {layer: gathered(members) for layer, members in found.items()}


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
