"""Weight matching: permute one model's units onto another's, group after group (Git Re-Basin, arXiv:2209.04836).

The objective is sum_t <A_t, pi(B_t)> over all tensors t that a group moves; its largest value has the smallest
||A - pi(B)||, as permutations keep norms.  It is bilinear in the groups, so each one given the others is a linear
assignment, and a sweep over all of them never lowers it (coordinate ascent, with local optima: see `restarts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.errors import NumericError
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import Orders, SymmetryGroup, composed, identity, indices, moved, permute, units
from weightsmith.ops.assign import assigned, similarity

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STATISTICS", "Matched", "coupled", "match", "objective", "profits", "walk"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Endings of names of tensors that move with their units and do not count in the objective."""

State = Mapping[str, "Tensor"]

_LARGE = 512  # units from which on products are in float32: they take longer than the assignment
_HELD = 1 << 29  # bytes of profits that are kept from step to step


@dataclass(frozen=True)
class Matched:
    """A permutation of the moving model.

    orders  of every group, see `core.symmetry.Orders`
    before  the objective over all tensors that the groups move, with every unit where it was
    after   and where the orders put it
    steps   the objective after each accepted step, of the best start
    """

    orders: Orders
    before: float
    after: float
    steps: tuple[float, ...] = field(default=(), repr=False)

    @property
    def aligned(self) -> bool:
        """Whether the models lay as well before: no unit has moved."""
        return all((order == np.arange(order.shape[-1])).all() for order in self.orders.values())


def match(
    groups: Sequence[SymmetryGroup],
    reference: State,
    moving: State,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-12,
    start: Orders | None = None,
    normalize: bool = False,
    skip: Sequence[str] = STATISTICS,
) -> Matched:
    """Find how to permute `moving` onto `reference`; both: tensor name -> tensor, at least those of the groups.

    seed       of the order of the groups in every sweep; each of the `restarts` draws another, the best one is kept.
               The first sweep of the first takes them as given: what is tied to inputs or outputs should come first
    max_iter   sweeps over all groups
    tol        a step counts if it raises the objective by more than max(tol, 1e-9 |objective of its group|)
    start      orders to begin with (default: units as they are)
    normalize  divide the term of each tensor by its norms in both models
    skip       endings of names of tensors that move but do not count

    Profits are summed in float64.  A group of nested ones (heads) is solved in two levels: for each pair of units the
    groups inside, whose optimum is the pair's profit.  That is exact where a unit holds one group, else an ascent.
    Raises NumericError for NaN and Inf, with the tensor's name.
    """
    names = [name for group in groups for name in group.names]
    for label, state in (("reference", reference), ("moving model", moving)):
        for name in names:
            if not bool(torch.isfinite(state[name]).all()):
                raise NumericError(f"{name} of the {label} holds NaN or Inf; nothing can be matched with it")
    a = {name: _counted(name, reference[name], moving[name], normalize, skip) for name in names}
    b = {name: moving[name] for name in names}
    best: Matched | None = None
    for again in range(max(restarts, 1)):
        draw = np.random.default_rng([seed, again])
        orders, steps = _ascent(groups, a, b, draw, max_iter, tol, start or {}, as_given=again == 0)
        found = Matched(orders, objective(a, b), steps[-1], tuple(steps))
        if best is None or found.after > best.after:
            best = found
    assert best is not None
    return best


def objective(a: State, b: State, names: Iterable[str] | None = None) -> float:
    """Sum over tensors of <A_t, B_t>: rows in the tensors' dtype, their sum in float64."""
    return sum(_inner(a[n], b[n]) for n in (a if names is None else names))


def _inner(a: Tensor, b: Tensor) -> float:
    dtype = torch.promote_types(a.dtype, b.dtype)
    width = max(a.shape[-1], 1) if a.ndim else 1
    rows = torch.linalg.vecdot(a.to(dtype).reshape(-1, width), b.to(dtype).reshape(-1, width))
    return float(rows.double().sum())


def walk(groups: Sequence[SymmetryGroup]) -> Iterator[list[SymmetryGroup]]:
    """The groups in sets that have no tensor in common: each can be matched by itself."""
    left = list(groups)
    while left:
        found, names = [left.pop(0)], set()
        for group in found:  # grows while it is walked through
            names |= set(group.names)
            near = [other for other in left if names & set(other.names)]
            found += near
            left = [other for other in left if other not in near]
        yield sorted(found, key=groups.index)


def coupled(group: SymmetryGroup) -> bool:
    """Whether a tensor has the group on two axes: its objective is then not linear in the permutation."""
    return len({(a.name, a.axis) for a in group.axes}) > len({a.name for a in group.axes})


def profits(group: SymmetryGroup, reference: State, moving: State, orders: Orders, others: Sequence[SymmetryGroup]) -> (
    np.ndarray
):  # fmt: skip
    """[units, units] float64: what unit j of the moving model gains at place i while the other groups stay in `orders`.

    For a group without groups inside.
    """
    rest = [other for other in others if other.name != group.name]
    shapes = {name: moving[name].shape for other in rest for name in other.names}
    places = indices(rest, orders, shapes)
    b = {name: moved(moving[name], places.get(name, {})) for name in group.names}
    return _profit(group, reference, b)


# --- one ascent ------------------------------------------------------------------------------------


def _counted(name: str, a: Tensor, b: Tensor, normalize: bool, skip: Sequence[str]) -> Tensor:
    """The reference's tensor as it counts in the objective."""
    if name.rpartition(".")[2] in skip:
        return torch.zeros_like(a)
    size = float(a.double().norm() * b.double().norm()) if normalize else 1.0
    return a.double() / size if normalize and size else a


def _ascent(
    groups: Sequence[SymmetryGroup],
    a: State,
    b: State,
    draw: np.random.Generator | None,
    max_iter: int,
    tol: float,
    start: Orders,
    as_given: bool = False,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Orders, and the objective at the start and after each step.  draw: None takes the groups as given."""
    orders: dict[str, np.ndarray] = {}
    for group in groups:
        orders |= {**identity(group), **{n: start[n] for n in identity(group) if n in start}}
    places = indices(groups, orders, {name: t.shape for name, t in b.items()})
    now = {name: moved(t, places.get(name, {})) for name, t in b.items()}
    near = {g.name: [o.name for o in groups if o is not g and set(o.names) & set(g.names)] for g in groups}
    open_ = {group.name for group in groups}  # whose best order may have changed since it was last found
    steps = [objective(a, now)]
    known = _Products(groups, a)
    for sweep in range(max_iter):
        if not open_:
            break
        given = draw is None or (as_given and sweep == 0)
        for index in range(len(groups)) if draw is None or given else draw.permutation(len(groups)):
            group = groups[index]
            if group.name not in open_:
                continue
            open_.discard(group.name)
            before = objective(a, now, group.names)
            then, gain = _nested(group, a, now, tol) if group.inside else _flat(group, known.profit(group, now))
            if gain <= (least := max(tol, 1e-9 * abs(before))):
                continue
            new = permute(now, group, then)
            if coupled(group):
                gain = objective(a, new, group.names) - before
                if gain <= least:
                    continue
                open_.add(group.name)
            known.update(group, then, now, new)
            now |= new
            orders |= composed(group, orders, then)
            steps.append(steps[-1] + gain)
            open_.update(near[group.name])
    return orders, steps


def _profit(group: SymmetryGroup, a: State, b: State) -> np.ndarray:
    sides = [[units(state[x.name], x, group.size) for x in group.axes] for state in (a, b)]
    found: np.ndarray = similarity(*sides, double=group.size < _LARGE).cpu().numpy()
    return found


class _Products:
    """Profits of groups as units move: after a step only what it moved is multiplied anew.

    A permutation of a neighbour changes a shared tensor in the entries S that moved, and the profit of this group by
    A[:, S] (B' - B)[:, S]^T; its own one permutes columns.  Late steps move few.  Held where groups are neighbours,
    lie plainly (a unit is one entry), and all profits fit in `_HELD` bytes.
    """

    def __init__(self, groups: Sequence[SymmetryGroup], a: State) -> None:
        self.a = a
        plain = [g for g in groups if not g.inside and not coupled(g) and all(x.outer == x.inner == 1 for x in g.axes)]
        fits = len(plain) > 1 and sum(8 * g.size**2 for g in plain) <= _HELD
        self.groups = {g.name: g for g in plain} if fits else {}
        self.held: dict[str, np.ndarray] = {}

    def profit(self, group: SymmetryGroup, now: State) -> np.ndarray:
        if group.name not in self.groups:
            return _profit(group, self.a, now)
        if group.name not in self.held:
            self.held[group.name] = _profit(group, self.a, now)
        return self.held[group.name]

    def update(self, moved: SymmetryGroup, then: Orders, old: State, new: State) -> None:
        """Take in that the units of a group were permuted, before `old` becomes `new`."""
        order = then[moved.name]
        if moved.name in self.held:
            self.held[moved.name] = np.take(self.held[moved.name], order, axis=1)
        places = torch.from_numpy(np.flatnonzero(order != np.arange(len(order))))
        for name in [name for name in self.held if name != moved.name]:
            pairs = [
                (x, y) for x in self.groups[name].axes for y in moved.axes if x.name == y.name and x.axis != y.axis
            ]
            if pairs and moved.name not in self.groups:
                del self.held[name]
                continue
            for x, y in pairs:
                shown = [t.index_select(y.axis, y.start + places) for t in (self.a[x.name], old[x.name], new[x.name])]
                left, before, after = (units(t, x, self.groups[name].size).flatten(1) for t in shown)
                self.held[name] += ((after - before) @ left.to(after.dtype).T).T.double().numpy()


def _flat(group: SymmetryGroup, profit: np.ndarray) -> tuple[Orders, float]:
    """The best order of a group, from where its units are now, and what it gains."""
    order = assigned(profit)
    return {group.name: order}, float(profit[np.arange(group.size), order].sum() - profit.diagonal().sum())


def _nested(group: SymmetryGroup, a: State, b: State, tol: float) -> tuple[Orders, float]:
    """The same of a group with groups inside: their optimum is what a pair of units gains."""
    left, right = ([units(state[x.name], x, group.size) for x in group.axes] for state in (a, b))
    profit = np.empty((group.size, group.size))
    found: dict[tuple[int, int], Orders] = {}
    for i in range(group.size):
        here = {str(k): unit[i] for k, unit in enumerate(left)}
        for j in range(group.size):
            there = {str(k): unit[j] for k, unit in enumerate(right)}
            found[i, j], steps = _ascent(group.inside, here, there, None, 20, tol, {})
            profit[i, j] = steps[-1]
    order = assigned(profit)
    inner = {
        group.inner(small): np.stack([found[i, int(j)][small.name] for i, j in enumerate(order)])
        for small in group.inside
    }
    before = sum(map(_inner, left, right))
    return {group.name: order, **inner}, float(profit[np.arange(group.size), order].sum()) - before
