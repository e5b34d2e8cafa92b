"""Groups of tensor axes that may be permuted together without changing what the network computes.

A permutation of an MLP's hidden units moves the rows of its gate and up projections (and their biases) and the
columns of its down projection.  The units of a group may hold groups themselves: a key-value head has its query heads
and the entries of its values.  `groups` finds MLPs from roles and shapes; `align.layout` finds the rest of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Axis", "Orders", "SymmetryGroup", "composed", "groups", "identity", "indices", "moved", "permute", "units"]

Orders = Mapping[str, np.ndarray]
"""Name of a group -> [size] int64: position i holds unit order[i].  A group inside another is 'outer/inner' and has one
order for each unit where it now stands: [outer size, size].  A group that is not there stays as it is."""


@dataclass(frozen=True)
class Axis:
    """Where the units of a group lie on one axis of one tensor.

    From entry `start` on there are `outer` repetitions of all units, each unit `inner` entries wide: an axis of
    hidden units has 1 and 1, both halves of a fused gate_up outer = 2, heads of 64 entries inner = 64.
    """

    name: str
    axis: int
    start: int = 0
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class SymmetryGroup:
    """Axes with `size` units that share one permutation.

    inside  groups of each unit.  Their axes are called '0', '1', ... for the axes of this group, and lie in a unit:
            in its outer * inner entries on that axis, in the whole length of any other axis
    """

    name: str
    kind: str
    size: int
    axes: tuple[Axis, ...]
    inside: tuple[SymmetryGroup, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a.name for a in self.axes))

    def inner(self, group: SymmetryGroup) -> str:
        """What an inner group is called in `Orders`."""
        return f"{self.name}/{group.name}"


def groups(keys: Iterable[Key], kind: str = "mlp") -> tuple[SymmetryGroup, ...]:
    """Find the groups of one kind.  'mlp': hidden units of `down(act(gate(x)) * up(x))` and `fc2(act(fc1(x)))`."""
    if kind != "mlp":
        raise ValueError(f"unknown kind of symmetry {kind!r}; known: mlp")
    modules: dict[str, dict[str, list[Key]]] = {}
    for key in keys:
        if key.role in ("gate", "up", "gate_up", "down"):
            parent = key.name.rsplit(".", 2)[0]  # strip 'up_proj.weight'
            modules.setdefault(parent, {}).setdefault(key.role, []).append(key)
    found = []
    for parent, by_role in modules.items():
        ups = [key for role in ("gate", "up", "gate_up") for key in by_role.get(role, ())]
        downs = by_role.get("down", [])
        matrices = [k for k in downs if len(k.shape) == 2]
        if len(matrices) != 1 or not any(len(k.shape) == 2 for k in ups):
            continue
        size = matrices[0].shape[1]
        inner = matrices[0].shape[0]
        times = {k.name: 2 if k.role == "gate_up" else 1 for k in ups}  # fused: one half behind the other
        if any(k.shape not in ((times[k.name] * size, inner), (times[k.name] * size,)) for k in ups):
            continue  # stored transposed or packed: not a layout this recognises
        axes = (*(Axis(k.name, 0, outer=times[k.name]) for k in ups), Axis(matrices[0].name, 1))
        found.append(SymmetryGroup(f"{parent}.hidden", kind, size, axes))
    return tuple(found)


# --- orders ----------------------------------------------------------------------------------------


def identity(group: SymmetryGroup) -> dict[str, np.ndarray]:
    """The orders of a group, and of those inside it, that change nothing."""
    inner = {group.inner(g): np.tile(np.arange(g.size), (group.size, 1)) for g in group.inside}
    return {group.name: np.arange(group.size), **inner}


def composed(group: SymmetryGroup, first: Orders, then: Orders) -> dict[str, np.ndarray]:
    """The orders of one group that do what `first` and then `then` do."""
    before, after = {**identity(group), **first}, {**identity(group), **then}
    order = after[group.name]
    found = {group.name: before[group.name][order]}
    for small in group.inside:
        name = group.inner(small)
        found[name] = np.take_along_axis(before[name][order], after[name], axis=1)
    return found


def indices(groups: Iterable[SymmetryGroup], orders: Orders, shapes: Mapping[str, Sequence[int]]) -> dict[
    str, dict[int, np.ndarray]
]:  # fmt: skip
    """For every tensor that moves, axis -> which entry of the stored axis stands at each place of the new one.

    An index is [length], or [rows, length] where each row of the new axis 0 has one of its own.  No group may be
    given that shares the entries of an axis with another, but for those inside it.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for group in groups:
        for axis, own, other in _moves(group, {**identity(group), **orders}, shapes):
            places = found.setdefault(axis.name, {})
            before = places.get(axis.axis)
            places[axis.axis] = own if before is None else before[own]
            places.update(other)
    return found


def _moves(
    group: SymmetryGroup, orders: Orders, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Axis, np.ndarray, dict[int, np.ndarray]]]:
    """For each axis of a group: its index, and indices per unit of other axes."""
    for number, axis in enumerate(group.axes):
        shape = shapes[axis.name]
        own = np.arange(shape[axis.axis])
        other: dict[int, np.ndarray] = {}
        stop = axis.start + axis.outer * group.size * axis.inner
        block = own[axis.start : stop].reshape(axis.outer, group.size, axis.inner)
        parts = np.ascontiguousarray(block[:, orders[group.name]].transpose(1, 0, 2)).reshape(group.size, -1)
        for small in group.inside:
            order = orders[group.inner(small)]
            for place in (p for p in small.axes if p.name == str(number)):
                if place.axis == axis.axis:
                    _reorder(parts, place, order)
                else:
                    full = other.setdefault(place.axis, np.tile(np.arange(shape[place.axis]), (group.size, 1)))
                    _reorder(full, place, order)
        own[axis.start : stop] = parts.reshape(group.size, axis.outer, axis.inner).transpose(1, 0, 2).reshape(-1)
        yield axis, own, other


def _reorder(rows: np.ndarray, place: Axis, order: np.ndarray) -> None:
    """Permute the units at one place of every row in its own order; rows: [units, length], order: [units, size]."""
    size = order.shape[1]
    part = rows[:, place.start : place.start + place.outer * size * place.inner]
    view = part.reshape(len(rows), place.outer, size, place.inner)
    part[:] = np.take_along_axis(view, order[:, None, :, None], axis=2).reshape(len(rows), -1)


# --- tensors ---------------------------------------------------------------------------------------


def moved(tensor: Tensor, places: Mapping[int, np.ndarray]) -> Tensor:
    """A tensor in the order that `indices` gives for it."""
    for axis, index in sorted(places.items()):
        found = torch.from_numpy(index).to(tensor.device)
        if index.ndim == 1:
            tensor = tensor.index_select(axis, found)
        else:  # one order for each row
            between = [1] * (axis - 1)
            after = [1] * (tensor.ndim - axis - 1)
            tensor = torch.take_along_dim(tensor, found.reshape(len(index), *between, -1, *after), axis)
    return tensor


def permute(
    tensors: Mapping[str, Tensor], group: SymmetryGroup, order: Orders | Sequence[int] | Any
) -> dict[str, Tensor]:
    """Apply an order, or those of the groups inside too, to every axis of a group.

    tensors: name -> tensor, at least the group's.  Returns the permuted tensors, by name.
    """
    orders = order if isinstance(order, Mapping) else {group.name: np.asarray(order)}
    places = indices([group], orders, {name: tensors[name].shape for name in group.names})
    return {name: moved(tensors[name], found) for name, found in places.items()}


def units(tensor: Tensor, axis: Axis, size: int) -> Tensor:
    """The units of a group on one axis of a tensor, first: [size, *shape], that axis with a unit's entries only."""
    length = axis.outer * size * axis.inner
    part = tensor.narrow(axis.axis, axis.start, length)
    before, after = part.shape[: axis.axis], part.shape[axis.axis + 1 :]
    block = part.reshape(*before, axis.outer, size, axis.inner, *after).movedim(axis.axis + 1, 0)
    return block.reshape(size, *before, axis.outer * axis.inner, *after)
