"""Groups of tensor axes that may be permuted together without changing what the network computes.

A permutation of an MLP's hidden units moves the rows of its gate and up projections (and their biases) and the
columns of its down projection.  Groups are found from roles and shapes, not from a table of architectures; an MLP
whose layout is not recognised (fused gate_up, GPT-2's transposed Conv1D) simply is in no group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Axis", "SymmetryGroup", "groups", "permute"]


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor."""

    name: str
    axis: int


@dataclass(frozen=True)
class SymmetryGroup:
    """Axes of equal length `size` that share one permutation."""

    name: str
    kind: str
    size: int
    axes: tuple[Axis, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a.name for a in self.axes))


def groups(keys: Iterable[Key], kind: str = "mlp") -> tuple[SymmetryGroup, ...]:
    """Find the groups of one kind.  'mlp': hidden units of `down(act(gate(x)) * up(x))` and `fc2(act(fc1(x)))`."""
    if kind != "mlp":
        raise ValueError(f"unknown kind of symmetry {kind!r}; known: mlp")
    modules: dict[str, dict[str, list[Key]]] = {}
    for key in keys:
        if key.role in ("gate", "up", "down"):
            parent = key.name.rsplit(".", 2)[0]  # strip 'up_proj.weight'
            modules.setdefault(parent, {}).setdefault(key.role, []).append(key)
    found = []
    for parent, by_role in modules.items():
        ups, downs = [*by_role.get("gate", ()), *by_role.get("up", ())], by_role.get("down", [])
        matrices = [k for k in downs if len(k.shape) == 2]
        if len(matrices) != 1 or not any(len(k.shape) == 2 for k in ups):
            continue
        size = matrices[0].shape[1]
        inner = matrices[0].shape[0]
        if any(k.shape not in ((size, inner), (size,)) for k in ups):
            continue  # stored transposed, fused or packed: not a layout this recognises
        axes = (*(Axis(k.name, 0) for k in ups), Axis(matrices[0].name, 1))
        found.append(SymmetryGroup(f"{parent}.hidden", kind, size, axes))
    return tuple(found)


def permute(tensors: Mapping[str, Tensor], group: SymmetryGroup, order: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Apply `order` to every axis of a group: position i of the result holds unit order[i].

    tensors: name -> tensor, at least the group's.  Returns the permuted tensors, by name.
    """
    index = torch.as_tensor(order)
    out: dict[str, Tensor] = {}
    for axis in group.axes:
        current = out.get(axis.name, tensors[axis.name])
        out[axis.name] = current.index_select(axis.axis, index.to(current.device))
    return out
